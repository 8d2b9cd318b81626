"""Linear layers over integer weights become calls of one operator, for which backends have a kernel
that reads those weights at their own size.

Left as they are traced, the weight is made into floats, which are written to memory and read again:
more bytes than a weight that was never quantized. Layers over the same input, such as those that
make queries, keys and values, become one call: starting a parallel loop takes a share of one row's
token.

Shape legend: N rows of a weight, K their size, G groups of 32 numbers in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, copy_graph_module

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
class _Found:
    """What a linear over integers is made of."""

    x: Node
    weight: Node
    scale: Node
    zero: Node | None
    bias: Node | None

    def nodes(self) -> tuple[Node | None, ...]:
        return self.x, self.weight, self.scale, self.zero, self.bias

    def alike(self) -> tuple[Any, ...]:
        """The same for linears that one call can make together, where the first of them is."""
        others = [node for node in self.nodes()[1:] if node is not None]
        alone = None if all(map(_is_operand, others)) else self
        dtype = self.scale.meta["val"].dtype
        return self.x, self.zero is None, self.bias is None, dtype, alone


@dataclass(frozen=True)
class QuantizedLinear(Pass):
    """Rewrite linear(x, dequantize(weight, scale, zero), bias) on the CPU as `quantized_linear`,
    those of the same x as one call; and what torchao's int8 weight-only tensors are traced as, a
    product with the integers that is scaled after it.
    """

    name: ClassVar[str] = "quantized-linear"
    preserves_numerics: ClassVar[bool] = False  # a kernel for it rounds less, in another order

    def run(self, gm: GraphModule) -> PassResult:
        if not any(map(_find, gm.graph.nodes)):
            return PassResult(gm, False)
        new, graph = copy_graph_module(gm)
        groups: dict[tuple[Any, ...], list[Node]] = {}
        taken: dict[tuple[Any, ...], set[Node | None]] = {}
        for node in graph.nodes:
            if (linear := _find(node)) is None:
                continue
            key, weights = linear.alike(), {*linear.nodes()[1:]} - {None}
            if weights & taken.setdefault(key, set()):  # a kernel names each of its operands once
                key = (*key, node)
            taken.setdefault(key, set()).update(weights)
            groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            _rewrite(graph, nodes)
        new.recompile()
        counts: dict[str, int | str] = {
            "linears rewritten": sum(map(len, groups.values())),
            "calls": len(groups),
        }
        return PassResult(new, True, counts)


def _rewrite(graph: Graph, nodes: Sequence[Node]) -> None:
    """Replace linears by one call, where the first of them is."""
    # found anew: what they are over may have been rewritten since
    linears = [linear for linear in map(_find, nodes) if linear is not None]
    with graph.inserting_before(nodes[0]):
        call = Caller(graph, nodes[0])
        operands: list[list[Node]] = []
        for column in zip(*(linear.nodes()[1:] for linear in linears), strict=True):
            operands.append([node for node in column if node is not None])
        target = torch.ops.polar_fx.quantized_linear.default
        result = call(target, call.dense(linears[0].x), *operands)
        end, parts = 0, list[Node]()
        for linear in linears:
            start, end = end, end + linear.weight.meta["val"].shape[0]
            whole = len(linears) == 1
            parts.append(result if whole else call(aten.slice.Tensor, result, -1, start, end))
    for node, part in zip(nodes, parts, strict=True):
        for user in node.users if len(nodes) > 1 else ():
            if user.target is aten.view.default:  # there are gaps between the rows of a part
                user.target = aten.reshape.default
        node.replace_all_uses_with(part)
        _erase(graph, node)


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node that nobody reads any more, and then what it alone has read."""
    read = node.all_input_nodes
    graph.erase_node(node)
    for other in read:
        # torch.export notes the dtype of what is cast; that alone is no reason to compute it
        if all(_calls(user, aten._assert_tensor_metadata.default) for user in other.users):
            for user in list(other.users):
                graph.erase_node(user)
        if not other.users and other.op == "call_function":
            _erase(graph, other)


def _find(node: Node) -> _Found | None:
    """What the node is made of, if it is a linear over integers that the kernel takes."""
    found = _of_linear(node) or _scaled_after(node)
    if found is None:
        return None
    values = [n if n is None else n.meta.get("val") for n in found.nodes()]
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
    return found if fits else None


def _of_linear(node: Node) -> _Found | None:
    """linear(x, dequantize(...), bias)"""
    if not _calls(node, aten.linear.default):
        return None
    x, made, *bias = node.args
    assert isinstance(x, Node) and isinstance(made, Node)
    added = bias[0] if bias and isinstance(bias[0], Node) else None
    parts = _of_bytes(made) or _of_nibbles(made)
    return parts and _Found(x, *parts, added)


def _of_bytes(made: Node) -> tuple[Node, Node, None] | None:
    """What `dequantize` traces for int8: to(weight) * scale."""
    if not _calls(made, aten.mul.Tensor):
        return None
    wide, scale = made.args
    if not (isinstance(scale, Node) and _calls(wide, aten.to.dtype)):
        return None
    weight = cast(Node, wide).args[0]
    return (weight, scale, None) if isinstance(weight, Node) and _is_operand(weight) else None


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
    return (weight, scale, zero) if high.args[0] is weight and _is_operand(weight) else None


def _scaled_after(node: Node) -> _Found | None:
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
    if not (_calls(turned, aten.t.default) and _is_operand(scale)):
        return None
    weight = cast(Node, cast(Node, turned).args[0])
    return _Found(x, weight, scale, None, None) if _is_operand(weight) else None


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _is_operand(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr")
