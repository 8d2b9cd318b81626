"""The CPU's kernel for `quantized_linear` (passes/quantized_linear.py): C++ that Inductor compiles
into a region like its own. What it shares with the kernel for weights in floats comes from
row_kernel.py.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..passes.quantized_linear import quantized_linear
from .quantized_source import SOURCE
from .row_kernel import SOURCE as SHARED

QUANTIZED_LINEAR: Any = torch.ops.polar_fx.quantized_linear.default
assert quantized_linear._opoverload is QUANTIZED_LINEAR

KERNEL = r"""
extern "C" {{kernel.def_kernel(
    inputs={"x": x, "w": w, "scale": scale, "zero": zero, "bias": bias}, outputs={"y": y}
)}}
{
    using T = {{kernel.dtype(x)}};
    using W = polar_fx::{{"Bytes" if zero is none else "Nibbles"}};
    int64_t M = 1;
    {%- for axis in axes %}
    M *= {{kernel.size(x, axis)}};
    {%- endfor %}
    const int64_t N = {{kernel.size(w, 0)}}, K = {{kernel.size(x, -1)}};
    const auto* weight = (const W::Data*)w;
    const polar_fx::Scales<{{kernel.dtype(scale)}}> of{
        scale, {{"nullptr" if zero is none else "zero"}}, {{groups}}
    };
    const T* added = {{"nullptr" if bias is none else "bias"}};
    if (M > polar_fx::Step<T>::most) {
        const int64_t most = std::max<int64_t>(1, polar_fx::NUMBERS_AT_A_TIME / K);
        std::unique_ptr<T[]> made(new T[std::min(most, N) * K]);
        for (int64_t first = 0; first < N; first += most) {
            const int64_t count = std::min(most, N - first);
            {%- if threads > 1 %}
            #pragma omp parallel for num_threads({{threads}}) schedule(static)
            {%- endif %}
            for (int64_t n = 0; n < count; ++n) {
                polar_fx::as_floats<W>(made.get() + n * K, weight, of, first + n, K);
            }
            polar_fx::by_library(
                x, made.get(), added == nullptr ? added : added + first, y + first, M, count, K, N
            );
        }
        return;
    }
    const auto given = polar_fx::given_of<W>(x, of, M, K);
    {%- if threads > 1 %}
    #pragma omp parallel for num_threads({{threads}}) schedule(static)
    {%- endif %}
    for (int64_t n = 0; n < N; n += polar_fx::W_ROWS_OF_INTEGERS) {
        polar_fx::group_of_integers<W>(n, given, weight, of, added, y, M, N, K);
    }
}
"""


def register() -> None:
    """Teach Inductor the kernel, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.utils import parallel_num_threads

    class Template(CppTemplate):
        """`quantized_linear` as C++; `operands` are x, weight, scale, zero, bias or None each."""

        operands: Sequence[Any]

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            given = iter(self.input_nodes)
            x, w, scale, zero, bias = (o and next(given) for o in self.operands)
            return (
                self.header().getvalue()
                + SHARED
                + SOURCE
                + self._template_from_string(KERNEL).render(
                    kernel=kernel,
                    x=x,
                    w=w,
                    scale=scale,
                    zero=zero,
                    bias=bias,
                    y=template_buffer_node or self.output_node,
                    axes=range(len(x.get_size()) - 1),
                    groups=1 if zero is None else kernel.size(scale, 1),
                    threads=self.num_threads,
                )
            )

    @register_lowering(QUANTIZED_LINEAR, type_promotion_kind=None)
    def _(x: Any, weight: Any, scale: Any, zero: Any, bias: Any) -> Any:
        require = ir.ExternKernel.require_contiguous
        operands = [
            o and require(ir.ExternKernel.realize_input(o)) for o in (x, weight, scale, zero, bias)
        ]
        size = [*x.get_size()[:-1], weight.get_size()[0]]
        layout = ir.FixedLayout(
            x.get_device(), x.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size)
        )
        given = [o for o in operands if o is not None]
        template = Template("quantized_linear", given, layout, parallel_num_threads())
        template.operands = operands
        return template.generate().output_node()
