"""A linear layer over a single row becomes a sum of products, which the compiler turns into one streaming loop.

Decoding one token reads every weight once: it is bound by memory, and a matrix-multiply kernel made for many rows
reads slower than a plain vectorized reduction (docs/performance.md has the figures).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .base import Pass, PassResult, copy_graph_module

aten = torch.ops.aten


def _is_single_row(node: Node) -> bool:
    """A linear on the CPU whose input is one vector, by static sizes."""
    if node.op != "call_function" or node.target is not aten.linear.default:
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or not value.is_floating_point():
        return False
    return all(isinstance(size, int) and size == 1 for size in value.shape[:-1])


@dataclass(frozen=True)
class MatvecToReduction(Pass):
    """Rewrite linear(x, w, b) with a single row x as sum(x * w) + b, accumulated in at least float32."""

    name: ClassVar[str] = "matvec-to-reduction"
    preserves_numerics: ClassVar[bool] = False  # the same products, summed in another order

    def run(self, gm: GraphModule) -> PassResult:
        if not any(_is_single_row(n) for n in gm.graph.nodes):
            return PassResult(gm, False)
        new, graph = copy_graph_module(gm)
        found = [n for n in graph.nodes if _is_single_row(n)]
        for node in found:
            with graph.inserting_before(node):
                node.replace_all_uses_with(self._reduce(graph, node))
            graph.erase_node(node)
        new.recompile()
        return PassResult(new, True, {"linears rewritten": len(found)})

    @staticmethod
    def _reduce(graph: Graph, node: Node) -> Node:
        def call(target: Any, *args: Any) -> Node:
            made = graph.call_function(target, args)
            values = map_arg(args, lambda n: n.meta["val"])
            made.meta = {**node.meta, "val": target(*values)}
            return made

        row, weight, *bias = node.args
        dtype = node.meta["val"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        if wide != dtype:
            row, weight = call(aten.to.dtype, row, wide), call(aten.to.dtype, weight, wide)
        result = call(aten.sum.dim_IntList, call(aten.mul.Tensor, call(aten.unsqueeze.default, row, -2), weight), [-1])
        if bias and bias[0] is not None:
            result = call(aten.add.Tensor, result, bias[0])
        return result if wide == dtype else call(aten.to.dtype, result, dtype)
