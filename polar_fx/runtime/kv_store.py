"""Keys and values by row and step: blocks of places in one growing store a slot geometry.

A row holds, for each step of its program, as many blocks as its tokens need. Rows come and go, and
what they held is found again by the next ones.

Shape legend: B rows, L columns, P places, H KV heads, E head size.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..capture import KvSpec

BLOCK = 16  # places that are taken at a time
_GROWTH = 8  # a full store grows by one part in so many, so that little is held in advance


class _Store:
    """Keys [P, H, E] and values [P, H, F] of one geometry, and which blocks of them are free.

    Block 0 stays zero and stands for columns that a row does not have; block 1 takes what padding
    writes.
    """

    def __init__(self, spec: KvSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.keys, self.values = self._empty(2 * BLOCK)
        self.free: list[int] = []

    @property
    def num_blocks(self) -> int:
        return len(self.keys) // BLOCK

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def _empty(self, places: int) -> tuple[Tensor, Tensor]:
        spec = self.spec
        sizes = ((places, spec.heads, spec.key_size), (places, spec.heads, spec.value_size))
        # zeros, not empty: masked columns are multiplied by zero, and 0 * NaN is NaN
        keys, values = (torch.zeros(s, dtype=spec.dtype, device=self.device) for s in sizes)
        return keys, values

    def take(self, count: int) -> list[int]:
        missing = count - len(self.free)
        if missing > 0:
            first = self.num_blocks
            more = max(missing, first // _GROWTH)
            keys, values = self._empty(more * BLOCK)
            self.keys = torch.cat((self.keys, keys))
            self.values = torch.cat((self.values, values))
            self.free += range(first + more - 1, first - 1, -1)
        return [self.free.pop() for _ in range(count)]

    def give(self, blocks: Sequence[int]) -> None:
        places = places_of(blocks, self.device)
        for tensor in (self.keys, self.values):
            tensor.index_fill_(0, places, 0)  # a later row must not meet a NaN of this one
        self.free += reversed(blocks)


def places_of(blocks: Sequence[int], device: torch.device) -> Tensor:
    """The places i64[BLOCK * N] of blocks, in order."""
    first = torch.tensor(blocks, dtype=torch.long, device=device)[:, None] * BLOCK
    return (first + torch.arange(BLOCK, device=device)).flatten()


class KvStore:
    """The stores of a model, and the rows that hold blocks of them; any thread may take and give.

    A call reads and writes the tensors that `tensors` gives at that time: they are replaced when a
    store grows, so calls and growth must not overlap (the lock is `lock`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self._stores: dict[KvSpec, _Store] = {}

    def tensors(self, spec: KvSpec) -> tuple[Tensor, Tensor]:
        """Keys [P, H, E] and values [P, H, F]."""
        store = self._store(spec)
        return store.keys, store.values

    @property
    def num_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(s.num_bytes for s in self._stores.values())

    @property
    def num_blocks(self) -> int:
        """Blocks that rows hold now."""
        return sum(s.num_blocks - 2 - len(s.free) for s in self._stores.values())

    @torch.inference_mode(False)  # stores outlive the mode they grow in
    def take(self, spec: KvSpec, count: int) -> list[int]:
        """Blocks for `count * BLOCK` columns of one row at one step; they hold zeros."""
        with self.lock:
            return self._store(spec).take(count)

    def give(self, spec: KvSpec, blocks: Sequence[int]) -> None:
        """Return blocks; what they hold is lost."""
        with self.lock:
            self._store(spec).give(blocks)

    def _store(self, spec: KvSpec) -> _Store:
        if spec not in self._stores:
            with self.lock, torch.inference_mode(False):
                self._stores.setdefault(spec, _Store(spec, self.device))
        return self._stores[spec]
