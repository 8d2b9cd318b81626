"""The CPU's kernel for `tiled_attention` (passes/attention_to_tiles.py): C++ that Inductor compiles
into a region like its own, around oneDNN's small products, which torch brings along.

The adapter around torch's semi-public C++ templates; nothing else in the project touches them.
"""

from typing import Any

import torch

from ..passes.attention_to_tiles import tiled_attention
from .tiled_source import SOURCE

TILED_ATTENTION: Any = torch.ops.polar_fx.tiled_attention.default
assert tiled_attention._opoverload is TILED_ATTENTION

KERNEL = r"""
extern "C" {{kernel.def_kernel(inputs=inputs, outputs={"y": y})}}
{
    using T = {{kernel.dtype(query)}};
    const polar_fx::Sizes sizes{
        {{kernel.size(query, 0)}}, {{kernel.size(query, 1)}}, {{kernel.size(key, 1)}},
        {{kernel.size(query, 2)}} / {{kernel.size(key, 1)}}, {{kernel.size(query, 3)}},
        {{kernel.size(value, 3)}}, {{kernel.size(key, 2)}}, {{kernel.size(blocks, 1)}}
    };
    {%- if mask is none %}
    const polar_fx::Mask<bool> seen{nullptr, 0, 0, 0};
    {%- else %}
    const auto seen = polar_fx::mask_of(
        mask, {{kernel.size(mask, 0)}}, {{kernel.size(mask, 1)}}, sizes
    );
    {%- endif %}
    polar_fx::attend<T>(query, key, value, blocks, seen, {{scale}}f, y, sizes, {{threads}});
}
"""


def is_faster() -> bool:
    """Whether the kernel is made for the processor: it needs AVX-512 and oneDNN
    (docs/performance.md has the figures).
    """
    has_vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_vectors and torch.backends.mkldnn.is_available()


def register() -> None:
    """Teach Inductor the kernel, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.utils import parallel_num_threads

    class Template(CppTemplate):
        """`tiled_attention` as C++, perhaps under a mask."""

        scale: float

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            names = ("query", "key", "value", "blocks", "mask")
            inputs = dict(zip(names, self.input_nodes, strict=False))
            y = template_buffer_node or self.output_node
            known = {"mask": None, **inputs, "kernel": kernel, "inputs": inputs, "y": y}
            text = self._template_from_string(KERNEL)
            filled = text.render(**known, scale=float(self.scale).hex(), threads=self.num_threads)
            return self.header().getvalue() + SOURCE + filled

    @register_lowering(TILED_ATTENTION, type_promotion_kind=None)
    def _(query: Any, key: Any, value: Any, blocks: Any, mask: Any, scale: float) -> Any:
        require = ir.ExternKernel.require_contiguous
        given = [query, key, value, blocks, *([] if mask is None else [mask])]
        operands = [require(ir.ExternKernel.realize_input(o)) for o in given]
        size = [*query.get_size()[:-1], value.get_size()[-1]]
        layout = ir.FixedLayout(
            query.get_device(), query.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size)
        )
        template = Template("tiled_attention", operands, layout, parallel_num_threads())
        template.scale = scale
        return template.generate().output_node()
