"""Linear layers over integer weights become calls of one operator, for which backends have a kernel
that reads those weights at their own size.

Left as they are traced, the weight is made into floats, which are written to memory and read again:
more bytes than a weight that was never quantized. Layers over the same input, such as those that
make queries, keys and values, become one call: starting a parallel loop takes a share of one row's
token.

Shape legend: N rows of a weight, K their size, G groups of 32 numbers in a row.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .base import Pass, PassResult
from .joined_linears import Linear, is_operand, join_linears

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)
GROUP = 32  # numbers that share a scale and a zero, where they are two a byte


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The weight [N, K] that integers stand for, in the dtype of `scale`.

    int8 weight [N, K] and scale [N, 1]: their product. uint8 weight [N, K / 2], a byte for two
    numbers of 0 to 15, the first in its low half; scale and zero [N, G, 1]: number * scale +
    zero.
    """
    if zero is None:
        return weight.to(scale.dtype) * scale
    halves = torch.bitwise_and(weight, 15), torch.bitwise_right_shift(weight, 4)
    pairs = torch.stack(halves, -1)
    groups = pairs.view(weight.shape[0], scale.shape[1], -1)
    return (groups.to(scale.dtype) * scale + zero).view(weight.shape[0], -1)


@torch.library.custom_op("polar_fx::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """x [..., K] times the rows of what `dequantize` makes of each weight, plus its bias [N], side
    by side: [..., sum of N] in the dtype of x, one of `DTYPES`. There are no zeros for int8
    weights, and a bias for each weight or for none. Raises what `torch.nn.functional.linear`
    raises.
    """
    parts: list[Tensor] = []
    for i, weight in enumerate(weights):
        made = dequantize(weight, scales[i], zeros[i] if zeros else None).to(x.dtype)
        parts.append(torch.nn.functional.linear(x, made, biases[i] if biases else None))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@cast(Any, quantized_linear).register_fake
def _(x: Tensor, weights: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


@dataclass(frozen=True)
class QuantizedLinear(Pass):
    """Rewrite linear(x, dequantize(weight, scale, zero), bias) on the CPU as `quantized_linear`,
    those of the same x as one call; and what torchao's int8 weight-only tensors are traced as, a
    product with the integers that is scaled after it.
    """

    name: ClassVar[str] = "quantized-linear"
    preserves_numerics: ClassVar[bool] = False  # a kernel for it rounds less, in another order

    def run(self, gm: GraphModule) -> PassResult:
        return join_linears(gm, _find, target=torch.ops.polar_fx.quantized_linear.default)


def _find(node: Node) -> Linear | None:
    """What the node is made of, if it is a linear over integers that the kernel takes."""
    found = _of_linear(node) or _scaled_after(node)
    if found is None:
        return None
    nodes = (found.x, *found.operands())
    values = [n if n is None else n.meta.get("val") for n in nodes]
    given = [v for v in values if v is not None]
    if not all(isinstance(v, Tensor) and v.device.type == "cpu" for v in given):
        return None
    x, weight, scale = cast(Sequence[Tensor], values[:3])
    zero, bias = cast(Sequence[Tensor | None], values[3:])
    fits = x.dtype in DTYPES and scale.dtype in DTYPES
    fits = fits and (bias is None or bias.dtype == x.dtype)
    fits = fits and all(v.is_contiguous() for v in (weight, scale))
    rows, columns = weight.shape
    if zero is None:
        fits = fits and weight.dtype == torch.int8 and scale.numel() == rows
    else:
        fits = fits and weight.dtype == torch.uint8 and zero.is_contiguous()
        fits = fits and zero.dtype == scale.dtype and 2 * columns == GROUP * scale.shape[1]
    return dataclasses.replace(found, kind=scale.dtype) if fits else None


def _of_linear(node: Node) -> Linear | None:
    """linear(x, dequantize(...), bias)"""
    if not _calls(node, aten.linear.default):
        return None
    x, made, *bias = node.args
    assert isinstance(x, Node) and isinstance(made, Node)
    added = bias[0] if bias and isinstance(bias[0], Node) else None
    parts = _of_bytes(made) or _of_nibbles(made)
    if parts is None:
        return None
    weight, scale, zero = parts
    return Linear(x, weight, (scale, zero, added), kind=None)


def _of_bytes(made: Node) -> tuple[Node, Node, None] | None:
    """What `dequantize` traces for int8: to(weight) * scale."""
    if not _calls(made, aten.mul.Tensor):
        return None
    wide, scale = made.args
    if not (isinstance(scale, Node) and _calls(wide, aten.to.dtype)):
        return None
    weight = cast(Node, wide).args[0]
    return (weight, scale, None) if isinstance(weight, Node) and is_operand(weight) else None


def _of_nibbles(made: Node) -> tuple[Node, Node, Node] | None:
    """What `dequantize` traces for two numbers a byte."""
    chain: list[Node] = [made]
    others: list[Any] = []
    for target in (
        aten.view.default,
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.to.dtype,
        aten.view.default,
        aten.stack.default,
    ):
        if not _calls(chain[-1], target):
            return None
        inner, *rest = chain[-1].args
        others.append(rest[0] if rest else None)
        if target is aten.stack.default:
            return _of_halves(inner, scale=others[2], zero=others[1])
        if not isinstance(inner, Node):
            return None
        chain.append(inner)
    return None


def _of_halves(halves: Any, *, scale: Any, zero: Any) -> tuple[Node, Node, Node] | None:
    low, high = halves
    is_low = _calls(low, aten.bitwise_and.Scalar) and low.args[1] == 15
    is_high = _calls(high, aten.bitwise_right_shift.Tensor_Scalar) and high.args[1] == 4
    if not (is_low and is_high and isinstance(scale, Node) and isinstance(zero, Node)):
        return None
    weight = low.args[0]
    return (weight, scale, zero) if high.args[0] is weight and is_operand(weight) else None


def _scaled_after(node: Node) -> Linear | None:
    """mm(x, to(t(weight))) * flatten(to(scale)): torchao's int8 weight-only linear."""
    if not _calls(node, aten.mul.Tensor):
        return None
    product, factors = node.args
    if not (_calls(product, aten.mm.default) and isinstance(factors, Node)):
        return None
    x, made = cast(Node, product).args
    if not (isinstance(x, Node) and _calls(made, aten.to.dtype)):
        return None
    turned = cast(Node, made).args[0]
    scale = factors
    while _calls(scale, aten.flatten.using_ints) or _calls(scale, aten.to.dtype):
        scale = cast(Node, scale.args[0])
    if not (_calls(turned, aten.t.default) and is_operand(scale)):
        return None
    weight = cast(Node, cast(Node, turned).args[0])
    return Linear(x, weight, (scale, None, None), kind=None) if is_operand(weight) else None


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target
