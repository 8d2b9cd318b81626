"""Step graph -> flat graph: replace every call into a body by the body's own nodes."""

from dataclasses import dataclass
from typing import ClassVar, cast

from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassResult, body


@dataclass(frozen=True)
class InlineLayers(Pass):
    """Inline prologue, layers and epilogue; nodes keep the layer and step they come from."""

    name: ClassVar[str] = "inline-layers"

    def run(self, gm: GraphModule) -> PassResult:
        calls = [n for n in gm.graph.nodes if n.op == "call_module"]
        if not calls:
            return PassResult(gm, False)
        graph = Graph()
        env: dict[Node, Node] = {}
        outputs: dict[Node, tuple[Node, ...]] = {}
        for node in gm.graph.nodes:
            if node.op == "call_module":
                result = self._inline(graph, body(gm, node), call=node, env=env)
                if isinstance(result, Node):
                    env[node] = result
                else:
                    outputs[node] = result
            elif node.op == "output":
                graph.output(env[node.args[0]])
            elif node.args and node.args[0] in outputs:  # getitem of a body with several results
                env[node] = outputs[node.args[0]][node.args[1]]
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
        return PassResult(
            GraphModule(gm, graph), True, {"calls inlined": len(calls), "nodes": len(graph.nodes)}
        )

    def _inline(
        self, graph: Graph, inner: GraphModule, *, call: Node, env: dict[Node, Node]
    ) -> Node | tuple[Node, ...]:
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        local = {p: env[a] for p, a in zip(placeholders, call.args, strict=True)}  # type: ignore[index]
        for node in inner.graph.nodes:
            if node.op == "output":
                result = cast(Node | tuple[Node, ...], node.args[0])
                if isinstance(result, Node):
                    return local[result]
                return tuple(local[r] for r in result)
            if node.op != "placeholder":
                new = local[node] = graph.node_copy(node, local.__getitem__)
                new.meta["layer"], new.meta["step"] = call.meta.get("layer"), call.meta.get("step")
        raise AssertionError("a graph ends with its output")
