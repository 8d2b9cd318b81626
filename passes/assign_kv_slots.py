"""One KV slot a step.

A layer that runs twice must not append twice to one slot: its second visit would attend to the keys
of the first. So KV belongs to the step; a step graph takes one `kv_<step>_<part>` operand per step
and part.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassError, PassResult, layer_calls, role


@dataclass(frozen=True)
class AssignKvSlots(Pass):
    """Give every layer call its own KV placeholders, in step order behind the other
    placeholders.
    """

    name: ClassVar[str] = "assign-kv-slots"
    # repeats compute something else, and right, afterwards
    preserves_numerics: ClassVar[bool] = False

    def run(self, gm: GraphModule) -> PassResult:
        calls = layer_calls(gm)
        step_of = {call: step for step, call in enumerate(calls)}
        if not calls:
            raise PassError(
                self.name, "the graph has no outlined layer calls", "run outline-layers first"
            )
        slots = list(map(_slots, calls))
        existing = {
            n.meta["slot"] for n in gm.graph.nodes if n.op == "placeholder" and role(n) == "kv"
        }
        if all(set(s) == {i} for i, s in enumerate(slots)) and existing == set(range(len(calls))):
            return PassResult(gm, False)
        graph = Graph()
        env: dict[Node, Node] = {}
        placed: dict[tuple[int, int], Node] = {}
        nodes = list(gm.graph.nodes)
        for node in nodes:
            if node.op == "placeholder" and role(node) != "kv":
                env[node] = graph.node_copy(node)
        for step, call in enumerate(calls):
            for old in call.args:
                if isinstance(old, Node) and role(old) == "kv":
                    new = graph.placeholder(f"kv_{step}_{old.meta['part']}")
                    new.meta = {**old.meta, "slot": step}
                    placed[step, old.meta["part"]] = new
        for node in nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                graph.output(env[node.args[0]])
            elif node in step_of:
                step = step_of[node]
                args = tuple(
                    placed[step, a.meta["part"]] if role(a) == "kv" else env[a] for a in node.args
                )  # type: ignore
                env[node] = graph.call_module(str(node.target), args)
                env[node].meta = {**node.meta, "step": step}
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
        return PassResult(
            GraphModule(gm, graph), True, {"kv slots": f"{len(existing)} -> {len(calls)}"}
        )


def _slots(call: Node) -> list[int]:
    """The slots whose keys and values a call takes."""
    return [a.meta["slot"] for a in call.args if isinstance(a, Node) and role(a) == "kv"]
