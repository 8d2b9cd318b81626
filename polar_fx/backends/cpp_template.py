"""How Inductor is told to call a kernel of ours: a C++ template in the place of an operator.

With the kernels themselves, the adapter around torch's semi-public `CppTemplate`; nothing else in
the project touches it.
"""

import itertools
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


def joined_output_of(
    template: type[Any], x: Any, *, lists: Sequence[Sequence[Any]], name: str
) -> Any:
    """What a kernel for several weights [N, ...] over the same x [..., K] gives: [..., sum of N].

    The first of the lists are the weights; the template gets the lengths of all as `counts`, and
    finds them again by `lists_of`.
    """
    size = [*x.get_size()[:-1], sum(weight.get_size()[0] for weight in lists[0])]
    operands = [x, *itertools.chain(*lists)]
    return output_of(template, operands, name=name, size=size, counts=[len(each) for each in lists])


def lists_of(
    operands: Sequence[Any], names: Sequence[str], *, counts: Sequence[int]
) -> tuple[dict[str, Any], list[list[Any]]]:
    """Operands as lists of so many, and each by its name in C++: that of its list and a number."""
    left = iter(operands)
    lists = [list(itertools.islice(left, count)) for count in counts]
    named: dict[str, Any] = {}
    for name, each in zip(names, lists, strict=True):
        named |= {f"{name}{i}": node for i, node in enumerate(each)}
    return named, lists


def start_of(kernel: Any, operand: Any) -> str:
    """C++ for where an operand begins, which may be within another's memory."""
    return f"&{kernel.index(operand, [0] * len(operand.get_size()))}"
