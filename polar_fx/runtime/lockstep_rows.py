"""Some rows that run together.

Shape legend: B rows, W blocks, n rows of a call, S steps of all rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .kv_rows import KvRow
from .kv_store import EMPTY
from .lockstep_plan import Part, Plan
from .on_device import on_device


def padded_size(count: int) -> int:
    """The next of the sizes 1, 2, 4, 6, 8, 12, 16, 24, 32 ...: few of them occur."""
    if count <= 2:
        return count
    power = 1 << (count - 1).bit_length()
    between = power // 4 * 3
    return between if power > 4 and count <= between else power


# What is advanced in place outlives the mode it is made in.
_OUTSIDE = torch.inference_mode(False)


class RowBatch:
    """Some rows that run together. What a pass needs to know of them is kept while they stay."""

    def __init__(self, rows: Sequence[KvRow]) -> None:
        self.rows = tuple(rows)
        self.programs = tuple(row.program for row in self.rows)
        self._tables: dict[Part, tuple[tuple[int, ...], int, list[Tensor]]] = {}
        # lengths, and the same on the device: it counts along, and nothing is copied for a token
        self._positions: tuple[list[int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self.rows]

    @property
    def versions(self) -> tuple[int, ...]:
        """They change with the blocks that rows hold."""
        return tuple(row.version for row in self.rows)

    @property
    def positions(self) -> Tensor:
        """The lengths i64[B, 1] on the device; `advance` changes them in place."""
        if self._positions is None or self._positions[0] != self.lengths:
            with _OUTSIDE:
                placed = on_device(self.lengths, self.rows[0].store.device)[:, None]
            self._positions = self.lengths, placed
        return self._positions[1]

    def advance(self, counts: Sequence[int]) -> None:
        """The next counts[b] tokens of each row are there."""
        known = self._positions is not None and self._positions[0] == self.lengths
        for row, count in zip(self.rows, counts, strict=True):
            row.length += count
        if known and self._positions is not None and set(counts) == {1}:
            self._positions = self.lengths, self._positions[1].add_(1)

    def close(self) -> None:
        """Give back every block."""
        for row in self.rows:
            row.close()

    def tables(self, plan: Plan, part: Part) -> tuple[int, list[Tensor]]:
        """How many blocks W, and i64[n, W] for each layer call."""
        versions, known = self.versions, self._tables.get(part)
        if known is None or known[0] != versions:
            width = self._width(max(row.num_blocks for row in self.rows))
            tables = self._placed(self.stacked(width), plan)
            known = self._tables[part] = versions, width, tables
        return known[1], known[2]

    def padded_tables(self, plan: Plan, spares: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """The same, and after them a block for what padding writes: of each row and step, that of
        `spares` i64[S].
        """
        width = self._width(1 + max(row.num_blocks for row in self.rows))
        stacked = self.stacked(width)
        stacked[:, -1] = torch.cat(list(spares))
        return width, self._placed(stacked, plan)

    def _width(self, blocks: int) -> int:
        """Regions are compiled for two blocks or more. On a GPU, tables lie at addresses that are
        multiples of 16 bytes, and its attention library makes a plan for each new size.
        """
        width = max(2, blocks)
        return padded_size(width) if self.rows[0].store.device.type == "cuda" else width

    def _placed(self, stacked: Tensor, plan: Plan) -> list[Tensor]:
        """The tables of each layer call, on the device."""
        tables = on_device(stacked.index_select(0, plan.places), self.rows[0].store.device)
        return list(tables.split(plan.sizes))

    def stacked(self, width: int) -> Tensor:
        """The rows' tables i64[S, W] on the host, one below the other, as wide as that."""
        own = []
        for row in self.rows:
            table = row.table[:, :width]
            own.append(pad(table, (0, width - table.shape[1]), value=EMPTY))
        return torch.cat(own)
