"""A linear layer over a single row becomes sums of products, which the compiler turns into
streaming loops: the way for those that linear-to-row-kernel leaves, such as in half precision or
with a weight laid out in another order.

Decoding one token reads every weight once: it is bound by memory, and a matrix-multiply kernel made
for many rows reads slower than a plain vectorized reduction (docs/performance.md has the figures).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, replace_each

aten = torch.ops.aten


def is_single_row(node: Node, device: str) -> bool:
    """A linear on that type of device whose input is one vector, by static sizes."""
    if node.op != "call_function" or node.target is not aten.linear.default:
        return False
    value, weight = node.meta.get("val"), _value(node.args[1])
    if (
        not isinstance(value, torch.Tensor)
        or weight is None
        or value.device.type != device
        or not value.is_floating_point()
        or weight.dim() != 2
    ):
        return False
    sizes = cast(Sequence[int | torch.SymInt], value.shape[:-1])
    return all(isinstance(size, int) and size == 1 for size in sizes)


def _value(argument: object) -> torch.Tensor | None:
    """The tensor that an argument stands for, as far as traced."""
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class MatvecToReduction(Pass):
    """Rewrite linear(x, w, b) with a single row x as sum(x * w) + b, accumulated in at least
    float32.

    The rows of w are summed as `streams` interleaved runs: one loop then reads from as many places
    at once, which keeps more of the memory's requests in flight. x is brought to memory in its wide
    type first (`as_strided` is what the compiler never inlines): computed anew for every row of w,
    what made x would cost more than reading w.
    """

    name: ClassVar[str] = "matvec-to-reduction"
    preserves_numerics: ClassVar[bool] = False  # the same products, summed in another order
    streams: int = 4

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams must be at least 1, got {self.streams}")

    def run(self, gm: GraphModule) -> PassResult:
        rows: dict[Node, Node] = {}
        return replace_each(
            gm,
            lambda node: is_single_row(node, "cpu"),
            make=lambda graph, node: self._reduce(graph, node, rows=rows),
            what="linears rewritten",
        )

    def _reduce(self, graph: Graph, node: Node, *, rows: dict[Node, Node]) -> Node:
        call = Caller(graph, node)
        row, weight, *bias = node.args
        assert isinstance(row, Node) and isinstance(weight, Node)
        value = node.meta["val"]
        wide = torch.promote_types(value.dtype, torch.float32)
        count, size = weight.meta["val"].shape
        if row not in rows:
            flat = call(aten.reshape.default, call.cast(row, wide), [1, size])
            dense = call.dense(flat)
            if dense.meta["val"].storage_offset() != 0:  # as_strided would begin at 0
                dense = call(aten.clone.default, dense)
            rows[row] = call(aten.as_strided.default, dense, [1, size], [size, 1])
        streams = self.streams if count % self.streams == 0 else 1
        parts: list[Node] = []
        for i in range(streams):
            part = weight
            if streams > 1:
                part = call(
                    aten.slice.Tensor, weight, 0, i * count // streams, (i + 1) * count // streams
                )
            parts.append(
                call(
                    aten.sum.dim_IntList,
                    call(aten.mul.Tensor, rows[row], call.cast(part, wide)),
                    [-1],
                )
            )
        result = parts[0] if streams == 1 else call(aten.cat.default, parts)
        if bias and bias[0] is not None:
            result = call(aten.add.Tensor, result, bias[0])
        return call.cast(call(aten.reshape.default, result, list(value.shape)), value.dtype)
