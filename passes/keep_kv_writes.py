"""A layer graph -> only what writes its keys and values.

Prefilling a prompt, the last step computes keys and values of every token, but attention output and
feed-forward only for the tokens whose logits are asked for: those run as if decoded, right behind
this.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassError, PassResult, in_slot, storage, writes

_ZERO = torch.ops.aten.new_zeros.default


def kv_writes(gm: GraphModule) -> list[Node]:
    """The operators that write into a part of the slot, or a view of one."""
    return [n for n in gm.graph.nodes if writes(n) and in_slot(storage(n))]


@dataclass(frozen=True)
class KeepKvWrites(Pass):
    """Drop every operator that no KV write needs. Operands stay, so calls look the same; a zero
    stands for the result, since an exported graph must have one.
    """

    name: ClassVar[str] = "keep-kv-writes"
    # the hidden state is gone; what is left writes the same bits
    preserves_numerics: ClassVar[bool] = False

    def run(self, gm: GraphModule) -> PassResult:
        wanted = kv_writes(gm)
        if not wanted:
            raise PassError(
                self.name,
                "the graph writes no keys, values or states",
                "run it on the graph of one layer",
            )
        kept = set(wanted)
        read: set[Node] = set()  # memory that what comes later reads
        for node in reversed(gm.graph.nodes):
            if node in kept or (writes(node) and storage(node) in read):
                kept |= {node, *node.all_input_nodes}
                read |= {storage(n) for n in node.all_input_nodes}
        done = gm.graph.output_node().args[0]
        if isinstance(done, Node) and done.target is _ZERO:
            return PassResult(gm, False)
        graph = Graph()
        env: dict[Node, Node] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder" or node in kept:
                env[node] = graph.node_copy(node, env.__getitem__)
        operands = graph.find_nodes(op="placeholder")
        graph.output(Caller(graph, wanted[-1])(_ZERO, operands[0], [1]))
        before, after = len(gm.graph.nodes), len(graph.nodes)
        return PassResult(GraphModule(gm, graph), True, {"nodes": f"{before} -> {after}"})
