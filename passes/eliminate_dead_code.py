"""Remove pure nodes nobody uses.

Writes into KV slots are kept: they are the point of some programs.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassResult


def _dead(gm: GraphModule) -> set[Node]:
    """Pure nodes whose results reach neither the output nor a write."""
    dead: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        kept = node.op in ("placeholder", "output", "call_module") or node.is_impure()
        if not kept and dead.issuperset(node.users):
            dead.add(node)
    return dead


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Drop unused values and unused references to weights; placeholders and calls into bodies
    stay.
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def run(self, gm: GraphModule) -> PassResult:
        dead = _dead(gm)
        if not dead:
            return PassResult(gm, False)
        graph = Graph()
        env: dict[Node, Node] = {}
        for node in gm.graph.nodes:
            if node not in dead:
                env[node] = graph.node_copy(node, env.__getitem__)
        # built anew, so that the module holds only what the graph still refers to
        return PassResult(GraphModule(gm, graph), True, {"dead nodes removed": len(dead)})
