"""The CPU's kernel for `quantized_linear` (passes/quantized_linear.py): C++ that Inductor compiles
into a region like its own. What it shares with the kernel for weights in floats comes from
linear_source.py.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..passes.quantized_linear import quantized_linear
from .cpp_template import joined_output_of, lists_of, start_of
from .linear_source import SOURCE as SHARED
from .quantized_source import SOURCE

QUANTIZED_LINEAR: Any = torch.ops.polar_fx.quantized_linear.default
assert quantized_linear._opoverload is QUANTIZED_LINEAR

KERNEL = r"""
extern "C" {{kernel.def_kernel(inputs=inputs, outputs={"y": y})}}
{
    using T = {{kernel.dtype(x)}};
    using S = {{kernel.dtype(scales[0])}};
    using W = polar_fx::{{"Nibbles" if zeros else "Bytes"}};
    int64_t M = 1;
    {%- for axis in axes %}
    M *= {{kernel.size(x, axis)}};
    {%- endfor %}
    if (M == 0) return;
    const int64_t K = {{kernel.size(x, -1)}};
    const T* read = {{start(x)}};
    int64_t total = 0, groups = 0;
    const int64_t size = polar_fx::integers_at_a_time(M);
    const auto weight_of = [&](
        const auto* data, const S* scale, const S* zero, const T* bias, int64_t N
    ) {
        const polar_fx::Weight<W::Data, S, T> weight{
            (const W::Data*)data, {scale, zero, {{groups}}}, bias, N,
            polar_fx::ceil_div(N, size), total
        };
        total += N;
        groups += weight.groups;
        return weight;
    };
    const polar_fx::Weight<W::Data, S, T> weights[] = {
        {%- for w in weights %}
        {%- set i = loop.index0 %}
        weight_of(
            {{start(w)}}, {{start(scales[i])}},
            {{start(zeros[i]) if zeros else "nullptr"}},
            {{start(biases[i]) if biases else "nullptr"}}, {{kernel.size(w, 0)}}
        ),
        {%- endfor %}
    };
    if (polar_fx::tiles_fit<T>(M, K, polar_fx::fastest_of_integers<T>())) {
        for (const auto& weight : weights) {
            const polar_fx::MadeRowsOf<W, S, T> rows{weight, K};
            polar_fx::multiply_tiles(
                read, rows, weight.bias, y + weight.first, M, weight.N, K, total, {{threads}}
            );
        }
        return;
    }
    if (M > polar_fx::Step<T>::most) {
        const int64_t most = std::max<int64_t>(1, polar_fx::NUMBERS_AT_A_TIME / K);
        std::unique_ptr<T[]> made(new T[std::min(most, total) * K]);
        for (const auto& weight : weights) {
            for (int64_t first = 0; first < weight.N; first += most) {
                const int64_t count = std::min(most, weight.N - first);
                {%- if threads > 1 %}
                #pragma omp parallel for num_threads({{threads}}) schedule(static)
                {%- endif %}
                for (int64_t n = 0; n < count; ++n) {
                    polar_fx::as_floats<W>(
                        made.get() + n * K, weight.data, weight.of, first + n, K
                    );
                }
                const T* added = weight.bias == nullptr ? nullptr : weight.bias + first;
                polar_fx::by_library(
                    read, made.get(), added, y + weight.first + first, M, count, K, total, false
                );
            }
        }
        return;
    }
    const auto given = polar_fx::given_of<W>(read, weights[0].of, M, K);
    {%- if threads > 1 %}
    #pragma omp parallel for num_threads({{threads}}) schedule(static)
    {%- endif %}
    for (int64_t number = 0; number < groups; ++number) {
        int64_t g = number;
        const auto& weight = polar_fx::weight_of(g, weights);
        polar_fx::group_of_integers<W>(g, size, given, weight, y, total, M, K);
    }
}
"""


def register() -> None:
    """Teach Inductor the kernel, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate

    class Template(CppTemplate):
        """`quantized_linear` as C++, of so many weights, which may have zeros and biases."""

        counts: Sequence[int]

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            x, *operands = self.input_nodes
            inputs, lists = lists_of(operands, ("w", "scale", "zero", "bias"), counts=self.counts)
            weights, scales, zeros, biases = lists
            return (
                self.header().getvalue()
                + SHARED
                + SOURCE
                + self._template_from_string(KERNEL).render(
                    kernel=kernel,
                    inputs={"x": x, **inputs},
                    start=functools.partial(start_of, kernel),
                    x=x,
                    weights=weights,
                    scales=scales,
                    zeros=zeros,
                    biases=biases,
                    y=template_buffer_node or self.output_node,
                    axes=range(len(x.get_size()) - 1),
                    groups=kernel.size(scales[0], 1) if zeros else 1,
                    threads=self.num_threads,
                )
            )

    @register_lowering(QUANTIZED_LINEAR, type_promotion_kind=None)
    def _(x: Any, weights: Any, scales: Any, zeros: Any, biases: Any) -> Any:
        return joined_output_of(
            Template, x, lists=(weights, scales, zeros, biases), name="quantized_linear"
        )
