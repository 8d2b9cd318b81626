"""Linear layers over rows or tokens become calls of one operator, for which backends have a kernel
that reads every weight once, as it lies in memory, unless the rows are many.

Decoding a few rows and short prompts are bound by reading weights, as decoding one row is. A
matrix-multiply kernel made for many rows reads them at a fraction of the memory's rate, or copies
them into an order of its own first, and sums of products as in matvec-to-reduction have no way to
ask for weights ahead of their use (docs/performance.md has the figures). Layers over the same token
of each row become one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .base import Pass, PassResult
from .joined_linears import Linear, is_operand, join_linears
from .matvec_to_reduction import is_single_row

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("polar_fx::row_linear", mutates_args=())
def row_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """x [B, T, K] times the rows of each weight [N, K], plus its bias [N], side by side: [B, T, sum
    of N], all of one dtype of `DTYPES`. Operands have no gaps, and there is a bias for each weight
    or for none. Raises what `torch.nn.functional.linear` raises.

    The same values as torch.nn.functional.linear's. Backends may have a kernel of their own for it.
    """
    parts: list[Tensor] = []
    for i, weight in enumerate(weights):
        parts.append(torch.nn.functional.linear(x, weight, biases[i] if biases else None))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@cast(Any, row_linear).register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


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


def _find(node: Node) -> Linear | None:
    """A linear on the CPU of x [B, T, K] and a weight of known sizes, which for one row is given:
    one that the graph makes, reductions make while they read.
    """
    operands = linear_operands(node, DTYPES)
    if operands is None or operands[0].dim() != 3:
        return None
    sizes = cast(Sequence[int | torch.SymInt], operands[1].shape)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    x, weight = cast(Sequence[Node], node.args[:2])
    added = cast(Node | None, node.args[2] if len(node.args) > 2 else None)
    if added is not None and tuple(added.meta["val"].shape) != (sizes[0],):
        return None  # one number for all
    if is_single_row(node, "cpu") and not is_operand(weight):
        return None
    tokens = cast(int | torch.SymInt, operands[0].shape[1])
    # of several tokens, a joined call is slower: its results are further apart
    shared = isinstance(tokens, int) and tokens == 1
    return Linear(x, weight, (added,), kind="a token" if shared else node)


@dataclass(frozen=True)
class LinearToRowKernel(Pass):
    """Rewrite linear(x, w, b) with x [B, T, K] as `row_linear` of x, w and b, those of the same x
    as one call if T is 1.
    """

    name: ClassVar[str] = "linear-to-row-kernel"
    preserves_numerics: ClassVar[bool] = False  # a kernel for it sums in another order

    def run(self, gm: GraphModule) -> PassResult:
        return join_linears(gm, _find, target=torch.ops.polar_fx.row_linear.default)
