"""The CPU's kernel for `block_attention` (passes/attention_over_blocks.py): C++ that Inductor
compiles into a region like its own. For several tokens it is built around oneDNN's small products,
which torch brings along.

An adapter around torch's semi-public C++ templates (cpp_template.py).
"""

from typing import Any

import torch

from ..passes.attention_over_blocks import block_attention
from . import linear_source, rows_source, tiles_source
from .cpp_template import output_of

BLOCK_ATTENTION: Any = torch.ops.polar_fx.block_attention.default
assert block_attention._opoverload is BLOCK_ATTENTION

SOURCE = linear_source.SOURCE + tiles_source.SOURCE + rows_source.SOURCE
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
        &{{kernel.index(mask, zeros)}}, {{kernel.size(mask, 0)}}, {{kernel.size(mask, 1)}}, sizes
    );
    {%- endif %}
    polar_fx::{{way}}<T>(
        &{{kernel.index(query, zeros)}}, &{{kernel.index(key, zeros)}},
        &{{kernel.index(value, zeros)}}, &{{kernel.index(blocks, zeros[:2])}}, seen, {{scale}}f,
        y, sizes, {{threads}}
    );
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
    from torch._inductor.lowering import register_lowering  # isort: skip (the template needs it)
    from torch._inductor.codegen.cpp_template import CppTemplate

    class Template(CppTemplate):
        """`block_attention` as C++, perhaps under a mask."""

        scale: float

        def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
            names = ("query", "key", "value", "blocks", "mask")
            inputs = dict(zip(names, self.input_nodes, strict=False))
            y = template_buffer_node or self.output_node
            one_token = inputs["query"].get_size()[1] == 1
            filled = self._template_from_string(KERNEL).render(
                **{"mask": None, **inputs},
                kernel=kernel,
                inputs=inputs,
                y=y,
                way="attend_rows" if one_token else "attend_tiles",
                zeros=[0, 0, 0, 0],
                scale=float(self.scale).hex(),
                threads=self.num_threads,
            )
            return self.header().getvalue() + SOURCE + filled

    @register_lowering(BLOCK_ATTENTION, type_promotion_kind=None)
    def _(query: Any, key: Any, value: Any, blocks: Any, mask: Any, scale: float) -> Any:
        given = [query, key, value, blocks, *([] if mask is None else [mask])]
        size = [*query.get_size()[:-1], value.get_size()[-1]]
        return output_of(Template, given, name="block_attention", size=size, scale=scale)
