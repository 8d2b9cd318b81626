"""Keys and values by row and step: blocks of columns in one growing store a slot geometry.

A row holds, for each step of its program, as many blocks as its tokens need. Rows come and go, and
what they held is found again by the next ones. Several rows may hold one block.

Shape legend: P blocks, C columns of a block, H KV heads, E head size.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import huge_pages
from ..capture import KvSpec
from ..passes.address_kv import BLOCK
from .on_device import on_device

# A block of every store that no row holds: it stays zero and stands for columns that a row does not
# have.
EMPTY = 0


@dataclass(frozen=True)
class Growth:
    """How a full store grows: by one `part` in so many of what it has, to at least `least` blocks.

    On the CPU little is held in advance. On a GPU, a store that moves costs the graphs that were
    captured on it.
    """

    part: int = 8
    least: int = 1

    @classmethod
    def on(cls, device: torch.device) -> "Growth":
        """What is usual on a device."""
        return cls(part=1, least=4096) if device.type == "cuda" else cls()


class _Store:
    """What grows with a row of one geometry, keys [P, H, C, E] and values [P, H, C, F] and further
    keys; which blocks of them are free, and how many rows hold each of the others.
    """

    def __init__(self, spec: KvSpec, device: torch.device, *, growth: Growth) -> None:
        self.spec, self.device, self.growth = spec, device, growth
        self.parts = [
            torch.zeros(1, part.heads, BLOCK, part.size, dtype=part.dtype, device=device)
            for part in spec.columns
        ]
        self.num_blocks = 1
        self.free: list[int] = []
        self.holders: Counter[int] = Counter()

    def _grow(self, blocks: int) -> None:
        """Hold so many blocks in all; the parts move one after the other."""
        for number, part in enumerate(self.parts):
            self.parts[number] = _grown(part, blocks)
        self.num_blocks = blocks

    def take(self, count: int) -> list[int]:
        missing = count - len(self.free)
        if missing > 0:
            first = self.num_blocks
            more = max(missing, first // self.growth.part, self.growth.least - first)
            try:
                self._grow(first + more)
            except torch.OutOfMemoryError:  # less may do
                more = missing
                self._grow(first + more)
            self.free += range(first + more - 1, first - 1, -1)
        taken = [self.free.pop() for _ in range(count)]
        self.holders.update(taken)
        return taken

    def give(self, blocks: Sequence[int]) -> None:
        self.holders.subtract(blocks)
        unheld = [block for block in dict.fromkeys(blocks) if not self.holders[block]]
        for block in unheld:
            del self.holders[block]
        where = on_device(unheld, self.device)
        for tensor in self.parts:
            tensor.index_fill_(0, where, 0)  # a later row must not meet a NaN of this one
        self.free += reversed(unheld)


def _grown(held: Tensor, blocks: int) -> Tensor:
    """A tensor of so many blocks with what was held, and zeros after it."""
    if len(held) == blocks:
        return held
    # zeros, not empty: masked columns are multiplied by zero, and 0 * NaN is NaN
    size = blocks, *held.shape[1:]
    on_cpu = held.device.type == "cpu"
    grown = huge_pages.zeros(size, dtype=held.dtype) if on_cpu else held.new_zeros(size)
    grown[: len(held)] = held[:blocks]  # fewer, if memory was short when another part grew
    return grown


class KvStore:
    """The stores of a model, and the rows that hold blocks of them; any thread may take and give.

    A call reads and writes the tensors that `tensors` gives at that time: they are replaced when a
    store grows, so calls and growth must not overlap (the lock is `lock`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.growth = device, Growth.on(device)
        self.lock = threading.RLock()
        self._stores: dict[KvSpec, _Store] = {}
        self._spares: dict[KvSpec, int] = {}

    def tensors(self, spec: KvSpec) -> tuple[Tensor, ...]:
        """Keys [P, H, C, E] and values [P, H, C, F], and further keys if the geometry has some."""
        return tuple(self._store(spec).parts)

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(t.nbytes for s in tuple(self._stores.values()) for t in s.parts)

    @property
    def num_allocated(self) -> int:
        """Blocks that are allocated, those included that no row may hold."""
        return sum(s.num_blocks for s in tuple(self._stores.values()))

    @property
    def num_blocks(self) -> int:
        """Blocks that rows hold now."""
        return sum(len(s.holders) for s in tuple(self._stores.values())) - len(self._spares)

    @torch.inference_mode(False)  # stores outlive the mode they grow in
    def take(self, spec: KvSpec, count: int) -> list[int]:
        """Blocks for one row at one step; they hold zeros."""
        with self.lock:
            return self._store(spec).take(count)

    def spare(self, spec: KvSpec) -> int:
        """The block that is for writing alone: what no row needs goes there."""
        if spec not in self._spares:
            (self._spares[spec],) = self.take(spec, 1)
        return self._spares[spec]

    def share(self, spec: KvSpec, blocks: Sequence[int]) -> None:
        """Let one more row hold these blocks."""
        with self.lock:
            self._store(spec).holders.update(blocks)

    def is_shared(self, spec: KvSpec, block: int) -> bool:
        """Whether several rows hold a block."""
        return self._store(spec).holders[block] > 1

    def give(self, spec: KvSpec, blocks: Sequence[int]) -> None:
        """Return blocks; what no other row holds is lost."""
        with self.lock:
            self._store(spec).give(blocks)

    def clear(self, spec: KvSpec, blocks: Sequence[int], *, column: int) -> None:
        """Zero the columns of blocks from one on."""
        with self.lock:
            where = on_device(blocks, self.device)
            for tensor in self.tensors(spec):
                tensor[where, :, column:] = 0

    def copy(self, spec: KvSpec, source: Sequence[int], *, target: Sequence[int]) -> None:
        """Copy what blocks hold to others."""
        with self.lock:
            read, write = torch.tensor([source, target], device=self.device)
            for tensor in self.tensors(spec):
                tensor[write] = tensor[read]

    def _store(self, spec: KvSpec) -> _Store:
        if spec not in self._stores:
            with self.lock, torch.inference_mode(False):
                self._stores.setdefault(spec, _Store(spec, self.device, growth=self.growth))
        return self._stores[spec]
