"""One slot a step, of keys and values and of states.

A layer that runs twice must not append twice to one slot: its second visit would attend to the keys
of the first, or go on from the state that the first has left. So slots belong to the step; a step
graph takes one operand `kv_<step>_<part>` or `state_<step>_<part>` per step and part. A layer that
only reads the keys and values of another one, its owner, has no slot: its step reads that of the
latest step of the owner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassError, PassResult, body, in_slot, layer_calls, role, writes_slot


@dataclass(frozen=True)
class AssignKvSlots(Pass):
    """Give every layer call that writes to a slot its own placeholders, in step order after the
    other placeholders.

    Raises PassError if a call only reads a slot that no call before it has written.
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
        existing = {n.meta["slot"] for n in gm.graph.nodes if n.op == "placeholder" and in_slot(n)}
        sources = self._sources(gm, calls)
        own = {source for source, used in zip(sources, slots, strict=True) if used}
        if all(used <= {s} for s, used in zip(sources, slots, strict=True)) and existing == own:
            return PassResult(gm, False)
        graph = Graph()
        env: dict[Node, Node] = {}
        placed: dict[tuple[int, int], Node] = {}
        nodes = list(gm.graph.nodes)
        for node in nodes:
            if node.op == "placeholder" and not in_slot(node):
                env[node] = graph.node_copy(node)
        for step, call in enumerate(calls):
            for old in call.args:
                if sources[step] == step and isinstance(old, Node) and in_slot(old):
                    new = graph.placeholder(f"{role(old)}_{step}_{old.meta['part']}")
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
                    placed[sources[step], a.meta["part"]] if in_slot(a) else env[a]
                    for a in node.args
                )  # type: ignore
                env[node] = graph.call_module(str(node.target), args)
                env[node].meta = {**node.meta, "step": step}
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
        return PassResult(
            GraphModule(gm, graph), True, {"kv slots": f"{len(existing)} -> {len(own)}"}
        )

    def _sources(self, gm: GraphModule, calls: Sequence[Node]) -> list[int]:
        """For each step the one whose slot it takes: itself, or the latest that wrote to the slot
        that it reads.
        """
        latest: dict[int, int] = {}
        sources: list[int] = []
        for step, call in enumerate(calls):
            source, used = step, _slots(call)
            if used and not writes_slot(body(gm, call)):
                (slot,) = used
                if slot not in latest:
                    raise PassError(
                        self.name,
                        f"step {step} reads the slot {slot}, which no step before it writes",
                        "schedule the layer that owns it earlier",
                    )
                source = latest[slot]
            else:
                latest |= dict.fromkeys(used, step)
            sources.append(source)
        return sources


def _slots(call: Node) -> set[int]:
    """The slots of which a call takes parts."""
    return {a.meta["slot"] for a in call.args if isinstance(a, Node) and in_slot(a)}
