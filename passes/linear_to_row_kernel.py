"""Linear layers over several rows or tokens become calls of one operator, for which backends have a
kernel that reads every weight once, as it lies in memory, unless the rows are many.

Decoding a few rows and short prompts are bound by reading weights, as decoding one row is. A
matrix-multiply kernel made for many rows reads them at a fraction of the memory's rate, or copies
them into an order of its own first, and sums of products as in matvec-to-reduction have no way to
ask for weights ahead of their use (docs/performance.md has the figures).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, replace_each
from .matvec_to_reduction import is_single_row

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("polar_fx::row_linear", mutates_args=())
def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, T, K] times the rows of weight [N, K], plus bias [N]: [B, T, N], all of one dtype of
    `DTYPES`; x and weight are contiguous.

    The same values as torch.nn.functional.linear's. Backends may have a kernel of their own for it.
    """
    return torch.nn.functional.linear(x, weight, bias)


@cast(Any, row_linear).register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_operands(node: Node, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, Tensor] | None:
    """x [..., K] and the weight [N, K], which is contiguous, of a linear on the CPU whose operands
    are all of one of these dtypes; None of any other node.
    """
    if node.op != "call_function" or node.target is not aten.linear.default:
        return None
    operands = [a.meta.get("val") for a in node.args if isinstance(a, Node)]
    if not all(isinstance(o, Tensor) and o.device.type == "cpu" for o in operands):
        return None
    x, weight, *_ = cast(Sequence[Tensor], operands)
    alike = x.dtype in dtypes and {o.dtype for o in cast(Sequence[Tensor], operands)} == {x.dtype}
    return (x, weight) if alike and weight.dim() == 2 and weight.is_contiguous() else None


def _is_of_rows(node: Node) -> bool:
    """A linear on the CPU of several rows or tokens, or of an unknown number of them."""
    operands = linear_operands(node, DTYPES)
    if operands is None or operands[0].dim() != 3:
        return False
    sizes = cast(Sequence[int | torch.SymInt], operands[1].shape)
    known = all(isinstance(size, int) and size > 0 for size in sizes)
    return known and not is_single_row(node, "cpu")


@dataclass(frozen=True)
class LinearToRowKernel(Pass):
    """Rewrite linear(x, w, b) with x [B, T, K], not of one row and token, as `row_linear` of x, w
    and b.
    """

    name: ClassVar[str] = "linear-to-row-kernel"
    preserves_numerics: ClassVar[bool] = False  # a kernel for it sums in another order

    def run(self, gm: GraphModule) -> PassResult:
        return replace_each(gm, _is_of_rows, make=_by_kernel, what="linears rewritten")


def _by_kernel(graph: Graph, node: Node) -> Node:
    call = Caller(graph, node)
    x, *others = node.args
    assert isinstance(x, Node)
    return call(torch.ops.polar_fx.row_linear.default, call.dense(x), *others)
