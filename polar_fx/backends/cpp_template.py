"""How Inductor is told to call a kernel of ours: a C++ template in the place of an operator.

With the kernels themselves, the adapter around torch's semi-public `CppTemplate`; nothing else in
the project touches it.
"""

from collections.abc import Sequence
from typing import Any


def output_of(
    template: type[Any],
    operands: Sequence[Any],
    *,
    name: str,
    size: Sequence[Any],
    **attributes: Any,
) -> Any:
    """What a kernel of that name gives, made from the template: `size`, of the first operand's
    dtype and device.

    The template gets the operands without gaps in memory, and `attributes` as its own.
    """
    from torch._inductor import ir
    from torch._inductor.utils import parallel_num_threads

    require = ir.ExternKernel.require_contiguous
    inputs = [require(ir.ExternKernel.realize_input(operand)) for operand in operands]
    strides = ir.FlexibleLayout.contiguous_strides(size)
    first = operands[0]
    layout = ir.FixedLayout(first.get_device(), first.get_dtype(), list(size), strides)
    made = template(name, inputs, layout, parallel_num_threads())
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made.generate().output_node()
