"""Remove pure nodes nobody uses. Writes into KV slots are kept: they are the point of some programs."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from .base import Pass, PassResult, copy_graph_module


def _is_dead(node: Node) -> bool:
    if node.users or node.op in ("placeholder", "output", "call_module"):
        return False
    return not node.is_impure()


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Drop unused values and unused references to weights; placeholders and calls into bodies stay."""

    name: ClassVar[str] = "eliminate-dead-code"

    def run(self, gm: GraphModule) -> PassResult:
        _, graph = copy_graph_module(gm)
        removed = 0
        for node in reversed(list(graph.nodes)):
            if _is_dead(node):
                graph.erase_node(node)
                removed += 1
        if not removed:
            return PassResult(gm, False)
        # rebuild so that the module holds only what the graph still refers to
        return PassResult(GraphModule(gm, graph), True, {"dead nodes removed": removed})
