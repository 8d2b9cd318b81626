"""The CPU's kernel for `row_linear` (passes/linear_to_row_kernel.py): C++ that Inductor compiles
into a region like its own. Its functions are in linear_source.py.

An adapter around torch's semi-public C++ templates (cpp_template.py).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..passes.linear_to_row_kernel import row_linear
from .cpp_template import joined_output_of, lists_of, start_of
from .linear_source import SOURCE

ROW_LINEAR: Any = torch.ops.polar_fx.row_linear.default
assert row_linear._opoverload is ROW_LINEAR

# Shape legend: M rows of x, K their size, N rows of a weight.
KERNEL = r"""
extern "C" {{kernel.def_kernel(inputs=inputs, outputs={"y": y})}}
{
    using T = {{kernel.dtype(x)}};
    const int64_t M = ({{kernel.size(x, 0)}}) * ({{kernel.size(x, 1)}});
    const int64_t K = {{kernel.size(x, 2)}};
    if (M == 0) return;
    const int64_t size = polar_fx::rows_at_a_time(M);
    int64_t total = 0, groups = 0;
    const auto weight_of = [&](const T* data, const T* bias, int64_t N) {
        const polar_fx::Plain<T> weight{data, bias, N, polar_fx::ceil_div(N, size), total};
        total += N;
        groups += weight.groups;
        return weight;
    };
    const polar_fx::Plain<T> weights[] = {
        {%- for w in weights %}
        weight_of(
            {{start(w)}}, {{start(biases[loop.index0]) if biases else "nullptr"}},
            {{kernel.size(w, 0)}}
        ),
        {%- endfor %}
    };
    const T* read = {{start(x)}};
    if (polar_fx::multiply_many(read, weights, y, total, M, K, {{threads}})) return;
    std::unique_ptr<polar_fx::Step<T>::X[]> place;
    const auto* given = polar_fx::as_read(read, M * K, place);
    {%- if threads > 1 %}
    #pragma omp parallel for num_threads({{threads}}) schedule(static)
    {%- endif %}
    for (int64_t number = 0; number < groups; ++number) {
        int64_t g = number;
        const auto& weight = polar_fx::weight_of(g, weights);
        polar_fx::group<T>(g, size, given, weight, y, total, M, K);
    }
}
"""


def register() -> None:
    """Teach Inductor the kernel, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate

    class RowLinear(CppTemplate):
        """`row_linear` of x [B, T, K] and of weights [N, K], which may have biases, as C++."""

        counts: Sequence[int]

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            x, *operands = self.input_nodes
            inputs, (weights, biases) = lists_of(operands, ("w", "bias"), counts=self.counts)
            return (
                self.header().getvalue()
                + SOURCE
                + self._template_from_string(KERNEL).render(
                    kernel=kernel,
                    inputs={"x": x, **inputs},
                    start=functools.partial(start_of, kernel),
                    x=x,
                    weights=weights,
                    biases=biases,
                    y=template_buffer_node or self.output_node,
                    threads=self.num_threads,
                )
            )

    @register_lowering(ROW_LINEAR, type_promotion_kind=None)
    def _(x: Any, weights: Any, biases: Any) -> Any:
        return joined_output_of(RowLinear, x, lists=(weights, biases), name="row_linear")
