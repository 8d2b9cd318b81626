"""Linear layers in float32 over several tokens become calls of oneDNN.

torch multiplies float32 matrices by MKL, which leaves the wider vectors of processors other than
Intel's unused; oneDNN, which torch brings along as well, makes its code for the processor that it
finds (docs/performance.md has the figures). Lower precisions go to oneDNN anyway.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, replace_each
from .linear_to_row_kernel import linear_operands
from .matvec_to_reduction import is_single_row


@torch.library.custom_op("polar_fx::onednn_linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the rows of weight [N, K], plus bias [N]: [..., N], all float32.

    The same values as torch.nn.functional.linear's; backends compute them by oneDNN.
    """
    return torch.nn.functional.linear(x, weight, bias)


@cast(Any, onednn_linear).register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _is_float32(node: Node) -> bool:
    """A linear in float32 on the CPU, with a weight as it lies in memory, unless x has one token of
    each row, [B, 1, K], or a single row: for these other passes have a faster way.
    """
    operands = linear_operands(node, (torch.float32,))
    if operands is None or operands[0].dim() < 2:
        return False
    tokens = cast(int | torch.SymInt, operands[0].shape[-2])
    # not `!= 1` alone, which would settle a size that may vary
    one_token = isinstance(tokens, int) and tokens == 1
    return not (one_token and operands[0].dim() == 3) and not is_single_row(node, "cpu")


@dataclass(frozen=True)
class LinearToOneDnn(Pass):
    """Rewrite linear(x, w, b) in float32, of several tokens, as oneDNN's product of the same
    operands.
    """

    name: ClassVar[str] = "linear-to-onednn"
    preserves_numerics: ClassVar[bool] = False  # another library sums in another order

    def run(self, gm: GraphModule) -> PassResult:
        return replace_each(gm, _is_float32, make=_by_onednn, what="linears rewritten")


def _by_onednn(graph: Graph, node: Node) -> Node:
    return Caller(graph, node)(torch.ops.polar_fx.onednn_linear.default, *node.args)
