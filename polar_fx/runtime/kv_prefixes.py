"""Keys and values that are found again: of rows whose first tokens, and first steps, are the same.

The keys and values of a token at a step depend on the tokens up to it and on the steps before. So a
row may take those of another row of the same program for the tokens at their beginning; and, where
programs share their first steps, those of these steps from any of them, together with the hidden
states that its own steps go on from.

Whole blocks are shared, never copied: they do not change once they are full.

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
from .kv_store import KvStore

_Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """One block of tokens after those of its parents: its blocks of keys and values i64[S], and
    the hidden states [C, d] after the last of these steps, if they are kept.
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
    kept as a program of these steps alone.
    """

    def __init__(self, store: KvStore, specs: Sequence[KvSpec], *, max_bytes: int) -> None:
        self.store, self.specs, self.max_bytes = store, specs, max_bytes
        self.num_bytes = 0
        self.tokens_found = 0  # in all, since it was made
        self._roots: dict[Program, dict[_Tokens, _Node]] = {}
        self._used: OrderedDict[_Node, None] = OrderedDict()  # children before their parents

    def __len__(self) -> int:
        """Blocks of tokens that are kept."""
        return len(self._used)

    def find(self, program: Program, tokens: Sequence[int]) -> Found | None:
        """The longest beginning of `tokens`, in whole blocks, that a row of `program` held."""
        nodes = self._walk(program, tokens)
        if not nodes:
            return None
        for node in reversed(nodes):
            self._used.move_to_end(node)
        hidden = [node.hidden for node in nodes if node.hidden is not None]
        found = Found(
            torch.stack([node.blocks for node in nodes], 1), torch.cat(hidden) if hidden else None
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
        if not self.max_bytes:
            return
        nodes = self._walk(program, tokens)
        below = nodes[-1].children if nodes else self._roots.setdefault(program, {})
        for index in range(len(nodes), len(tokens) // BLOCK):
            block = slice(index * BLOCK, (index + 1) * BLOCK)
            states = None if hidden is None else hidden[block].clone()
            own = tuple(tokens[block])
            node = _Node(program, below, own, table[:, index].clone(), states)
            for spec, numbers in self._blocks_of(node).items():
                self.store.share(spec, numbers)
            below[own], below = node, node.children
            nodes.append(node)
            self.num_bytes += self._bytes_of(node)
        for node in reversed(nodes):
            self._used[node] = None
            self._used.move_to_end(node)
        self._shrink(self.max_bytes)

    def clear(self) -> None:
        """Forget everything."""
        self._shrink(0)

    def _walk(self, program: Program, tokens: Sequence[int]) -> list[_Node]:
        nodes: list[_Node] = []
        below = self._roots.get(program, {})
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
            if not self._roots[node.program]:
                del self._roots[node.program]
            for spec, numbers in self._blocks_of(node).items():
                self.store.give(spec, numbers)
            self.num_bytes -= self._bytes_of(node)

    def _blocks_of(self, node: _Node) -> dict[KvSpec, list[int]]:
        found: dict[KvSpec, list[int]] = defaultdict(list)
        for layer, number in zip(node.program.path, node.blocks.tolist(), strict=True):
            found[self.specs[layer]].append(number)
        return found

    def _bytes_of(self, node: _Node) -> int:
        states = 0 if node.hidden is None else node.hidden.nbytes
        path = node.program.path
        return states + BLOCK * sum(self.specs[layer].bytes_per_token() for layer in path)
