"""The CPU's kernel for `quantized_linear` (passes/quantized_linear.py): C++ that Inductor compiles
into a region like its own. What it shares with the kernel for weights in floats comes from
row_kernel.py.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ..passes.quantized_linear import quantized_linear
from .cpp_template import output_of
from .quantized_source import SOURCE
from .row_kernel import SOURCE as SHARED

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
    const int64_t K = {{kernel.size(x, -1)}};
    int64_t total = 0, groups = 0;
    const auto weight_of = [&](
        const auto* data, const S* scale, const S* zero, const T* bias, int64_t N
    ) {
        const int64_t first = total;
        total += N;
        groups += polar_fx::groups_of_rows(N);
        return polar_fx::Weight<W::Data, S, T>{
            (const W::Data*)data, {scale, zero, {{groups}}}, bias, N, first
        };
    };
    const polar_fx::Weight<W::Data, S, T> weights[] = {
        {%- for w in weights %}
        weight_of(
            w{{loop.index0}}, scale{{loop.index0}},
            {{"zero%d" % loop.index0 if zeros else "nullptr"}},
            {{"bias%d" % loop.index0 if biases else "nullptr"}},
            {{kernel.size(w, 0)}}
        ),
        {%- endfor %}
    };
    if (polar_fx::tiles_fit<T>(M, K, polar_fx::FASTEST_OF_INTEGERS<T>)) {
        for (const auto& weight : weights) {
            const polar_fx::MadeRowsOf<W, S, T> rows{weight, K};
            polar_fx::multiply_tiles(
                x, rows, weight.bias, y + weight.first, M, weight.N, K, total, {{threads}}
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
                    x, made.get(), added, y + weight.first + first, M, count, K, total, false
                );
            }
        }
        return;
    }
    const auto given = polar_fx::given_of<W>(x, weights[0].of, M, K);
    {%- if threads > 1 %}
    #pragma omp parallel for num_threads({{threads}}) schedule(static)
    {%- endif %}
    for (int64_t g = 0; g < groups; ++g) {
        polar_fx::group_of_integers<W>(g, given, weights, y, total, M, K);
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
            x, *left = self.input_nodes
            inputs, lists = {"x": x}, []
            for name, count in zip(("w", "scale", "zero", "bias"), self.counts, strict=True):
                lists.append(left[:count])
                inputs |= {f"{name}{i}": node for i, node in enumerate(left[:count])}
                left = left[count:]
            weights, scales, zeros, biases = lists
            return (
                self.header().getvalue()
                + SHARED
                + SOURCE
                + self._template_from_string(KERNEL).render(
                    kernel=kernel,
                    inputs=inputs,
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
        lists = (weights, scales, zeros, biases)
        size = [*x.get_size()[:-1], sum(weight.get_size()[0] for weight in weights)]
        return output_of(
            Template,
            [x, *itertools.chain(*lists)],
            name="quantized_linear",
            size=size,
            counts=[len(each) for each in lists],
        )
