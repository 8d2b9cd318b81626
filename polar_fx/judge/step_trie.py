"""States of step prefixes: what rows of tokens have become after the first steps of programs, kept
for later programs.

Programs that begin with the same steps share a node. The least recently used states go when memory
is short.
"""

from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..program import Program


@dataclass(frozen=True, slots=True)
class State:
    """A row after a step: `hidden` [T, d]; `saved`, the hidden states blends still wait for; `kv`,
    what the step wrote for the row's tokens, keys and values [H, T, E] and states (kept only where
    other rows continue the row, or other layers read it); `read`, what was written last by each
    layer whose keys and values others read.
    """

    hidden: Tensor
    saved: tuple[Tensor, ...] = ()
    kv: tuple[Tensor, ...] | None = None
    read: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict[int, tuple[Tensor, ...]])

    @property
    def num_bytes(self) -> int:
        """Bytes of what this step made: `read` holds what steps before made."""
        return sum(
            t.numel() * t.element_size() for t in (self.hidden, *self.saved, *(self.kv or ()))
        )


class StepNode:
    """The end of a step prefix. `states` by row."""

    __slots__ = ("children", "closes", "layer", "opens", "parent", "states")

    def __init__(
        self,
        parent: "StepNode | None",
        layer: int = -1,
        *,
        opens: int = 0,
        closes: tuple[float, ...] = (),
    ) -> None:
        self.parent, self.layer, self.opens, self.closes = parent, layer, opens, closes
        self.children: dict[tuple[Any, ...], StepNode] = {}
        self.states: dict[Hashable, State] = {}

    def upwards(self) -> "Iterator[StepNode]":
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class StepTrie:
    """Nodes of all programs seen, and at most `limit_bytes` of states (more while programs are
    being run).
    """

    def __init__(self, limit_bytes: int) -> None:
        self.root = StepNode(None)
        self.limit_bytes, self.num_bytes = limit_bytes, 0
        self._used: OrderedDict[tuple[StepNode, Hashable], None] = OrderedDict()

    def leaf(self, program: Program) -> StepNode:
        """The node of all steps of a program."""
        node = self.root
        for step in program.schedule():
            key = (step.layer, step.opens, step.closes)
            if (child := node.children.get(key)) is None:
                child = StepNode(node, step.layer, opens=step.opens, closes=step.closes)
                node.children[key] = child
            node = child
        return node

    def put(self, node: StepNode, row: Hashable, *, state: State) -> None:
        node.states[row] = state
        self._used[node, row] = None
        self.num_bytes += state.num_bytes

    def touch(self, node: StepNode, row: Hashable) -> None:
        """Note a use."""
        self._used.move_to_end((node, row))

    def shrink(self) -> None:
        """Drop the states least recently used until the rest fits."""
        while self.num_bytes > self.limit_bytes and self._used:
            (node, row), _ = self._used.popitem(last=False)
            self._drop(node, row)

    def forget(self, rows: Container[Hashable]) -> None:
        """Drop every state of these rows."""
        for node, row in [k for k in self._used if k[1] in rows]:
            del self._used[node, row]
            self._drop(node, row)

    def _drop(self, node: StepNode, row: Hashable) -> None:
        self.num_bytes -= node.states.pop(row).num_bytes
        while node.parent is not None and not node.states and not node.children:
            parent = node.parent
            del parent.children[node.layer, node.opens, node.closes]
            node = parent
