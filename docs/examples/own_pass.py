"""A pass of your own: rewrite the graph of a layer, and compile with it.

    python docs/examples/own_pass.py [FOLDER_OR_MODEL_ID]

CONTRIBUTING.md says what a pass that becomes part of polar_fx needs besides.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

import polar_fx
from polar_fx.backends import AotInductorBackend
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.passes.base import Caller, Pass, PassResult, copy_graph_module

aten = torch.ops.aten


@dataclass(frozen=True)
class SquareToProduct(Pass):
    """x ** 2 becomes x * x, as in the norms of most models."""

    name: ClassVar[str] = "square-to-product"

    def run(self, gm: GraphModule) -> PassResult:
        new, graph = copy_graph_module(gm)  # the graph that came in stays as it is
        powers = graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)
        squares = [node for node in powers if node.args[1] == 2]
        for node in squares:
            with graph.inserting_before(node):
                product = Caller(graph, node)(aten.mul.Tensor, node.args[0], node.args[0])
            node.replace_all_uses_with(product)
            graph.erase_node(node)
        if not squares:
            return PassResult(gm, False)
        new.recompile()
        return PassResult(new, True, {"squares replaced": len(squares)})


model, tokenizer = polar_fx.load(*sys.argv[1:2])
reference = polar_fx.compile(model, "eager", max_length=63, cache=False)
for name, body in reference.library.bodies.items():
    result = SquareToProduct().run(body)
    print(name, dict(result.counts) or "unchanged")

# compiled code is kept under a key with the pass's source, so an edited pass compiles anew
backend = AotInductorBackend(passes=(SquareToProduct(), *REGION_PASSES))
compiled = polar_fx.compile(model, backend, max_length=63)
ids = tokenizer("6 * 7 =", return_tensors="pt").input_ids
difference = (compiled.forward(ids) - reference.forward(ids)).abs().max()
print(f"largest difference of logits: {difference:.1e}")
