"""Linear layers in float32 become calls of oneDNN.

torch multiplies float32 matrices by MKL, which leaves the wider vectors of processors other than
Intel's unused; oneDNN, which torch brings along as well, makes its code for the processor that it
finds (docs/performance.md has the figures). Lower precisions go to oneDNN anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .base import Caller, Pass, PassResult, copy_graph_module

aten = torch.ops.aten


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
    """A linear in float32 on the CPU, with a weight as it lies in memory."""
    if node.op != "call_function" or node.target is not aten.linear.default:
        return False
    operands = [a.meta.get("val") for a in node.args if isinstance(a, Node)]
    if not all(
        isinstance(o, Tensor) and o.device.type == "cpu" and o.dtype == torch.float32
        for o in operands
    ):
        return False
    x, weight = cast(Sequence[Tensor], operands[:2])
    return x.dim() >= 2 and weight.dim() == 2 and weight.is_contiguous()


@dataclass(frozen=True)
class LinearToOneDnn(Pass):
    """Rewrite linear(x, w, b) in float32 as oneDNN's product of the same operands."""

    name: ClassVar[str] = "linear-to-onednn"
    preserves_numerics: ClassVar[bool] = False  # another library sums in another order

    def run(self, gm: GraphModule) -> PassResult:
        if not any(_is_float32(n) for n in gm.graph.nodes):
            return PassResult(gm, False)
        new, graph = copy_graph_module(gm)
        found = [n for n in graph.nodes if _is_float32(n)]
        for node in found:
            with graph.inserting_before(node):
                call = Caller(graph, node)
                target = torch.ops.polar_fx.onednn_linear.default
                node.replace_all_uses_with(call(target, *node.args))
            graph.erase_node(node)
        new.recompile()
        return PassResult(new, True, {"linears rewritten": len(found)})
