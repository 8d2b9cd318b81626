"""Rows of different programs in one batch, in lock-step: every layer call serves all rows whose
next step it is.

Keys and values lie by row and step in a `KvStore`, so any rows, at whatever steps of their
programs, are one call; attention reads as many columns as the longest row has.

Shape legend: B rows, T tokens, L columns, d hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import Region, RegionName, ShapeClass
from ..library import LayerLibrary
from ..library.steps import HIDDEN, Blends, Step, side_values
from ..library.symbols import Symbol
from ..program import Program
from .kv_cache import RowCache
from .kv_store import BLOCK, KvStore, places_of
from .lockstep_order import LayerCall, lockstep_calls
from .regions import RegionTable

_EMPTY, _PADDING = 0, 1  # blocks of every store that no row holds (kv_store.py)


@dataclass
class _Row:
    """The blocks of one row: a list a step of its program."""

    program: Program
    blocks: list[list[int]]
    length: int = 0


@dataclass(frozen=True, eq=False)
class _Call:
    """A layer call, ready for a width L: who takes part, and the places of their columns."""

    layer: int
    rows: tuple[int, ...]
    index: Tensor | None  # i64[n] on the device; None if all rows take part
    columns: Tensor  # i64[n, L]
    opens: tuple[tuple[int, int], ...]  # (row, how many blends)
    closes: tuple[tuple[int, tuple[float, ...]], ...]  # (row, their dampings)


class LockstepSession(RowCache):
    """Some rows, a program each, and what they hold. A context manager: at its end all is given
    back.
    """

    def __init__(
        self, store: KvStore, library: LayerLibrary, programs: Sequence[Program], max_length: int
    ) -> None:
        self.layers = []
        self.store, self.library, self.max_length = store, library, max_length
        self.programs = tuple(programs)
        self._order = lockstep_calls(self.programs)
        self._schedules = [p.schedule() for p in self.programs]
        self._rows = [_Row(p, [[] for _ in p.path]) for p in self.programs]
        self._calls: dict[tuple[int, bool], list[_Call]] = {}

    def __enter__(self) -> "LockstepSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back every block."""
        for row in self._rows:
            for layer, blocks in zip(row.program.path, row.blocks, strict=True):
                if blocks:
                    self.store.give(self.library.table.kv_specs[layer], blocks)
                    blocks.clear()
        self._calls.clear()

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self._rows]

    @property
    def num_calls(self) -> int:
        """Layer calls a token: U of the union, against the sum of the programs' steps."""
        return len(self._order)

    def make_room(self, counts: Sequence[int]) -> None:
        """Take the blocks that counts[b] more tokens of each row need."""
        self.require(counts)
        for row, count in zip(self._rows, counts, strict=True):
            missing = -(-(row.length + count) // BLOCK) - len(row.blocks[0])
            if missing <= 0:
                continue
            self._calls.clear()
            for layer, blocks in zip(row.program.path, row.blocks, strict=True):
                blocks += self.store.take(self.library.table.kv_specs[layer], missing)

    def calls(self, ragged: bool) -> list[_Call]:
        """The layer calls of one pass; `ragged` adds a block of columns for padding to write to."""
        blocks = max(len(row.blocks[0]) for row in self._rows) + ragged
        key = (blocks, ragged)
        if key not in self._calls:
            self._calls[key] = [self._call(call, blocks, ragged) for call in self._order]
        return self._calls[key]

    def _call(self, call: LayerCall, width: int, ragged: bool) -> _Call:
        device = self.store.device
        tables, opens, closes = [], [], []
        for row, step in zip(call.rows, call.steps, strict=True):
            own = self._rows[row].blocks[step]
            table = own + [_EMPTY] * (width - len(own))
            if ragged:
                table[-1] = _PADDING
            tables.append(places_of(table, device))
            scheduled = self._schedules[row][step]
            if scheduled.opens:
                opens.append((row, scheduled.opens))
            if scheduled.closes:
                closes.append((row, scheduled.closes))
        everyone = len(call.rows) == len(self._rows)
        index = None if everyone else torch.tensor(call.rows, device=device)
        columns = torch.stack(tables)
        return _Call(call.layer, call.rows, index, columns, tuple(opens), tuple(closes))

    def advance(self, counts: Sequence[int]) -> None:
        """The tokens of the last pass are there now."""
        for row, count in zip(self._rows, counts, strict=True):
            row.length += count

    # ---- what transformers' generation asks of a cache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams (beam search); beams of one prompt run one program."""
        order = beam_idx.tolist()
        before = self.lengths
        copied = []
        for row, source in zip(self._rows, order, strict=True):
            other = self._rows[source]
            if other.program != row.program:
                raise AssertionError(f"a beam went from {other.program} to {row.program}")
            for layer, own, theirs in zip(row.program.path, row.blocks, other.blocks, strict=True):
                width = min(len(own), len(theirs))
                keys, values = self.store.tensors(self.library.table.kv_specs[layer])
                source_places = places_of(theirs[:width], self.store.device)
                places = places_of(own[:width], self.store.device)
                copied.append((keys, places, keys[source_places]))
                copied.append((values, places, values[source_places]))
        for tensor, places, rows in copied:  # all are read before any is written
            tensor[places] = rows
        for row, source in zip(self._rows, order, strict=True):
            row.length = before[source]

    def __len__(self) -> int:
        return max(p.num_steps for p in self.programs)


class Lockstep:
    """Runs sessions on the regions of a table; compiles what is missing, as linking does."""

    def __init__(self, library: LayerLibrary, regions: RegionTable, max_length: int) -> None:
        self.library, self.regions, self.max_length = library, regions, max_length
        self.store = KvStore(library.device)
        self._axes = {call.target: self._batch_axes(call) for call in library.table.calls()}

    @property
    def possible(self) -> bool:
        """Whether rows can be told apart in every value that layers take.

        Some models fold the rows of a batch into another axis, such as that of heads.
        """
        return None not in self._axes.values()

    def open(self, programs: Sequence[Program]) -> LockstepSession:
        """A session of empty rows, one a program, to be used as a context manager."""
        return LockstepSession(self.store, self.library, programs, self.max_length)

    def _batch_axes(self, call: Symbol) -> tuple[int | None, ...] | None:
        """The axis of the batch in each side value of a body; None if one cannot be told."""
        axes: list[int | None] = []
        for operand in self.library.table.bodies[call.target].operands:
            if operand.role not in ("side", "input"):
                continue
            found = [i for i, name in operand.axes().items() if name == "batch"]
            if len(found) > 1 or (not found and any("B" in size for size in operand.size)):
                return None
            axes.append(found[0] if found else None)
        return tuple(axes)

    @torch.no_grad()
    def run(
        self, session: LockstepSession, ids: Tensor, counts: Sequence[int], *, every: bool = False
    ) -> Tensor:
        """One pass over the next counts[b] of ids i64[B, T] of each row.

        Returns the logits [B, 1, V] of each row's last token, or [B, T, V] of all if `every`.
        Raises KvOverflowError before anything runs.
        """
        with self.store.lock:  # a store that grows is replaced: no other pass may be writing to it
            return self._run(session, ids, counts, every)

    def _run(
        self, session: LockstepSession, ids: Tensor, counts: Sequence[int], every: bool
    ) -> Tensor:
        batch, tokens = ids.shape
        session.make_room(counts)
        ragged = min(counts) < tokens
        calls = session.calls(ragged)
        width = calls[0].columns.shape[1]
        inputs = self._inputs(session, ids, counts, width)
        shape = ShapeClass.of(batch, tokens, None)
        values = self._start(inputs, shape)
        hidden = self._steps(session, calls, values, tokens)
        session.advance(counts)
        if every or tokens == 1:
            return self._head(hidden, values, shape)
        rows = torch.arange(batch, device=ids.device)
        last = torch.tensor(counts, device=ids.device).clamp(min=1) - 1

        def pick(tensor: Tensor) -> Tensor:
            return tensor[rows, last][:, None]

        one = [pick(inputs[0]), pick(inputs[1]), inputs[2]]
        return self._head(pick(hidden), self._start(one, shape.decode), shape.decode)

    def _inputs(
        self, session: LockstepSession, ids: Tensor, counts: Sequence[int], width: int
    ) -> list[Tensor]:
        """Token ids, positions and columns; padding is sent to the last column."""
        device, tokens = ids.device, ids.shape[1]
        first = torch.tensor(session.lengths, device=device)[:, None]
        offsets = torch.arange(tokens, device=device)
        own = torch.tensor(counts, device=device)[:, None]
        positions = torch.where(offsets < own, first + offsets, width - 1)
        return [ids.contiguous(), positions, torch.arange(width, device=device)]

    def _start(self, inputs: list[Tensor], shape: ShapeClass) -> list[Tensor]:
        start = self.library.prologue
        return side_values(self._region(start.target, shape), inputs, start.weights)

    def _head(self, hidden: Tensor, values: Sequence[Tensor], shape: ShapeClass) -> Tensor:
        head = self.library.epilogue
        return head.step(self._region(head.target, shape)).run(hidden, values)

    def _region(self, name: str, shape: ShapeClass) -> Region:
        return self.regions.one(RegionName(name, shape))

    def _steps(
        self, session: LockstepSession, calls: Sequence[_Call], values: list[Tensor], tokens: int
    ) -> Tensor:
        """The hidden state [B, T, d] after every row's last step."""
        hidden = values[HIDDEN].clone()  # it is written row by row
        blends = [Blends(torch.lerp) for _ in session.programs]
        chosen: dict[tuple[tuple[int, ...], int, int | None], Tensor] = {}

        def side(call: _Call, number: int, axis: int | None) -> Tensor:
            if call.index is None or axis is None:
                return values[number]
            key = (call.rows, number, axis)  # several layers ask for the same rows
            if key not in chosen:
                chosen[key] = values[number].index_select(axis, call.index)
            return chosen[key]

        for call in calls:
            layer = self.library.layers[call.layer]
            axes = self._axes[layer.target] or ()
            for row, opens in call.opens:
                blends[row].open(hidden[row].clone(), opens)
            sides = [side(call, n, a) for n, a in zip(layer.sides, axes, strict=True)]
            keys, vals = self.store.tensors(self.library.table.kv_specs[call.layer])
            shape = ShapeClass.of(len(call.rows), tokens, None)
            state = hidden if call.index is None else hidden.index_select(0, call.index)
            step = Step(self._region(layer.target, shape), range(len(sides)), layer.weights)
            result = step.run(state, sides, (keys, vals, call.columns))
            if call.index is None:
                hidden = result
            else:
                hidden.index_copy_(0, call.index, result)
            for row, dampings in call.closes:
                hidden[row] = blends[row].close(hidden[row], dampings)
        return hidden
