"""Keys and values that are found again: of rows whose first tokens, and first steps, are the same.

The keys and values of a token at a step depend on the tokens up to it and on the steps before. So a
row may take those of another row of the same program for the tokens at their beginning; and, where
programs share their first steps, those of these steps from any of them, together with the hidden
states that its own steps go on from.

Whole blocks are shared, never copied: they do not change once they are full. Where a layer has a
window, a row may have given back its first blocks: what it held after them serves rows that go on
where no token sees them.

Shape legend: S steps, C tokens of a block, n blocks, d hidden size.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..capture import KvSpec
from ..passes.address_kv import BLOCK
from ..program import Program
from .kv_store import EMPTY, KvStore
from .kv_windows import KvWindows, first_seen

_Tokens = tuple[int, ...]
_Kind = tuple[Program, bool]  # whether hidden states are kept with it


@dataclass(eq=False)
class _Node:
    """One block of tokens after those of its parents: its blocks of keys and values i64[S], EMPTY
    where they had left a window, and the hidden states [C, d] after the last of these steps, if
    they are kept.
    """

    program: Program
    parent: "dict[_Tokens, _Node]"
    tokens: _Tokens
    blocks: Tensor
    hidden: Tensor | None
    children: "dict[_Tokens, _Node]" = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Found:
    """What is known of the first tokens of a row: blocks i64[S, n] of n * C tokens, and the hidden
    states [n * C, d] after them, if they were kept.
    """

    blocks: Tensor
    hidden: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.blocks.shape[1] * BLOCK


class KvPrefixes:
    """Blocks of former rows of one store, at most `max_bytes` of them; those that were used least
    recently go first. To be used by one thread at a time.

    `specs` are the slot geometries of the model's layers. Steps that several programs share are
    kept as a program of these steps alone, together with hidden states, and apart from rows that
    run such a program.
    """

    def __init__(
        self, store: KvStore, specs: Sequence[KvSpec], *, windows: KvWindows, max_bytes: int
    ) -> None:
        self.store, self.specs, self.windows, self.max_bytes = store, specs, windows, max_bytes
        self.num_bytes = 0
        self.tokens_found = 0  # in all, since it was made
        self._roots: dict[_Kind, dict[_Tokens, _Node]] = {}
        self._used: OrderedDict[_Node, None] = OrderedDict()  # children before their parents

    def __len__(self) -> int:
        """Blocks of tokens that are kept."""
        return len(self._used)

    def find(
        self, program: Program, tokens: Sequence[int], *, hidden: bool = False
    ) -> Found | None:
        """The longest beginning of `tokens`, in whole blocks, of which all is kept that a row of
        `program` sees after it; `hidden` wants what was kept with hidden states.
        """
        nodes = self._walk((program, hidden), tokens)
        nodes = nodes[: self._in_sight(program, nodes)]
        if not nodes:
            return None
        for node in reversed(nodes):
            self._used.move_to_end(node)
        states = [node.hidden for node in nodes if node.hidden is not None]
        found = Found(
            torch.stack([node.blocks for node in nodes], 1), torch.cat(states) if states else None
        )
        self.tokens_found += found.num_tokens
        return found

    def keep(
        self,
        program: Program,
        tokens: Sequence[int],
        *,
        table: Tensor,
        hidden: Tensor | None = None,
    ) -> None:
        """Keep the whole blocks of a row that holds these tokens, `table` i64[S, >= n], and hidden
        states [>= n * C, d].
        """
        if not self.max_bytes or len(tokens) < BLOCK:
            return
        kind = program, hidden is not None
        nodes = self._walk(kind, tokens)
        if self.windows.steps(program):  # nowhere else may a node lack blocks
            for index, node in enumerate(nodes):
                self._fill(node, table[:, index])
        below = nodes[-1].children if nodes else self._roots.setdefault(kind, {})
        for index in range(len(nodes), len(tokens) // BLOCK):
            block = slice(index * BLOCK, (index + 1) * BLOCK)
            states = None if hidden is None else hidden[block].clone()
            own = tuple(tokens[block])
            node = _Node(program, below, own, table[:, index].clone(), states)
            self._hold(node, node.blocks)
            self.num_bytes += 0 if states is None else states.nbytes
            below[own], below = node, node.children
            nodes.append(node)
        for node in reversed(nodes):
            self._used[node] = None
            self._used.move_to_end(node)
        self._shrink(self.max_bytes)

    def clear(self) -> None:
        """Forget everything."""
        self._shrink(0)

    def _walk(self, kind: _Kind, tokens: Sequence[int]) -> list[_Node]:
        nodes: list[_Node] = []
        below = self._roots.get(kind, {})
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            node = below.get(tuple(tokens[start : start + BLOCK]))
            if node is None:
                break
            nodes.append(node)
            below = node.children
        return nodes

    def _shrink(self, num_bytes: int) -> None:
        while self.num_bytes > num_bytes:
            node, _ = self._used.popitem(last=False)  # it has no children left
            del node.parent[node.tokens]
            if not self._roots[kind := (node.program, node.hidden is not None)]:
                del self._roots[kind]
            for spec, numbers in self._by_spec(node.program, node.blocks).items():
                self.store.give(spec, numbers)
                self.num_bytes -= BLOCK * spec.bytes_per_token() * len(numbers)
            self.num_bytes -= 0 if node.hidden is None else node.hidden.nbytes

    def _in_sight(self, program: Program, nodes: Sequence[_Node]) -> int:
        """How many of the nodes hold all that a token after them sees."""
        windows = self.windows.steps(program)
        if not nodes or not windows:
            return len(nodes)
        blocks = torch.stack([node.blocks for node in nodes], 1)
        missing = {
            window: (blocks[steps] == EMPTY).any(0).tolist() for window, steps in windows.items()
        }
        for most in range(len(nodes), 0, -1):
            seen = (of[first_seen(most * BLOCK, w) : most] for w, of in missing.items())
            if not any(map(any, seen)):
                return most
        return 0

    def _fill(self, node: _Node, blocks: Tensor) -> None:
        """Hold those of the blocks i64[S] of a row that a node does not have."""
        missing = torch.where(node.blocks == EMPTY, blocks, EMPTY)
        if missing.any():
            self._hold(node, missing)
            node.blocks = torch.where(node.blocks == EMPTY, blocks, node.blocks)

    def _hold(self, node: _Node, blocks: Tensor) -> None:
        """Share the blocks i64[S] of a row, but for those that are EMPTY."""
        for spec, numbers in self._by_spec(node.program, blocks).items():
            self.store.share(spec, numbers)
            self.num_bytes += BLOCK * spec.bytes_per_token() * len(numbers)

    def _by_spec(self, program: Program, blocks: Tensor) -> dict[KvSpec, list[int]]:
        found: dict[KvSpec, list[int]] = defaultdict(list)
        for layer, number in zip(program.path, blocks.tolist(), strict=True):
            if number != EMPTY:
                found[self.specs[layer]].append(number)
        return found
