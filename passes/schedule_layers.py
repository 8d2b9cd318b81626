"""Layer graph + path (0,1,2,2,5) -> step graph: drop, keep and repeat layer calls."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassError, PassResult, kind, layer_calls

Blends = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class ScheduleLayers(Pass):
    """Execute the layer calls in the order of `path`.

    `blends` holds (start, stop, damping) over step numbers, outer before inner: the steps
    start..stop-1 become h + damping * (steps(h) - h). KV operands still name the layer's own slot
    afterwards; `assign-kv-slots` gives each step its own.
    """

    name: ClassVar[str] = "schedule-layers"
    preserves_numerics: ClassVar[bool] = False
    path: tuple[int, ...] = ()
    blends: Blends = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", tuple(self.path))
        object.__setattr__(
            self, "blends", tuple((int(a), int(b), float(d)) for a, b, d in self.blends)
        )

    def run(self, gm: GraphModule) -> PassResult:
        calls = layer_calls(gm)
        if not calls:
            raise PassError(
                self.name, "the graph has no outlined layer calls", "run outline-layers first"
            )
        by_layer: dict[int, Node] = {}
        for call in calls:
            by_layer.setdefault(call.meta["layer"], call)
        unknown = sorted(set(self.path) - set(by_layer))
        if unknown or not self.path:
            problem = f"layers {unknown} are not in the graph" if unknown else "the path is empty"
            raise PassError(self.name, problem, f"use layers among {sorted(by_layer)}")
        if [c.meta["layer"] for c in calls] == list(self.path) and self._blends_of(
            gm
        ) == self.blends:
            return PassResult(gm, False)
        graph = self._schedule(gm, by_layer, calls=calls)
        return PassResult(
            GraphModule(gm, graph), True, {"layer calls": f"{len(calls)} -> {len(self.path)}"}
        )

    @staticmethod
    def _blends_of(gm: GraphModule) -> Blends:
        found = [n.meta["blend"] for n in gm.graph.nodes if "blend" in n.meta]
        return tuple(sorted(found, key=lambda b: (b[0], -b[1])))

    def _schedule(self, gm: GraphModule, by_layer: dict[int, Node], *, calls: list[Node]) -> Graph:
        graph = Graph()
        env: dict[Node, Node] = {}
        first_hidden = calls[0].args[0]
        assert isinstance(first_hidden, Node)
        tail_start = calls[-1]
        # everything but the steps keeps its place; operands of any layer are made before the first
        # step
        steps = set(calls) | {n for n in gm.graph.nodes if "blend" in n.meta}
        head = [
            n
            for n in gm.graph.nodes
            if kind(n) != "epilogue" and n.op != "output" and n not in steps
        ]
        for node in head:
            env[node] = graph.node_copy(node, env.__getitem__)
        hidden = env[first_hidden]
        saved: list[Node] = []
        for step, layer in enumerate(self.path):
            saved += [hidden for start, _, _ in self.blends if start == step]
            template = by_layer[layer]
            operands = tuple(env[a] for a in template.args[1:])  # type: ignore[index]
            call = graph.call_module(str(template.target), (hidden, *operands))
            # which slot it owns is not settled
            call.meta = {k: v for k, v in template.meta.items() if k != "step"}
            hidden = call
            for start, stop, damping in reversed(self.blends):
                if stop == step + 1:
                    blended = graph.call_function(
                        torch.ops.aten.lerp.Scalar, (saved.pop(), hidden, damping)
                    )
                    blended.meta = {"val": hidden.meta.get("val"), "blend": (start, stop, damping)}
                    hidden = blended
        last = next((n for n in reversed(list(gm.graph.nodes)) if "blend" in n.meta), tail_start)
        env[tail_start] = env[last] = hidden
        for node in gm.graph.nodes:
            if kind(node) == "epilogue":
                env[node] = graph.node_copy(node, env.__getitem__)
            elif node.op == "output":
                graph.output(env[node.args[0]])
        return graph
