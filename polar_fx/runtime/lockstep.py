"""Rows of different programs in one batch, in lock-step: every layer call serves all rows whose
next step it is.

Keys and values lie by row and step in a `KvStore`, so any rows, at whatever steps of their
programs, are one call; attention reads as many columns as the longest row has.

Shape legend: B rows, T tokens, W blocks, L columns, d hidden size, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.base import Region, RegionName, ShapeClass
from ..capture import KvSpec
from ..library import LayerLibrary
from ..library.steps import HIDDEN, Blends, Step, side_values
from ..library.symbols import Symbol
from ..passes.address_kv import BLOCK
from ..program import Program
from ..program import Step as ScheduledStep
from .kv_rows import KvRow
from .kv_store import EMPTY, KvStore
from .lockstep_order import LayerCall, lockstep_calls
from .regions import RegionTable

# Which logits of a pass are wanted: of each row's last token, of every token, or none, for the
# hidden states after the last step.
Wants = Literal["last", "every", "hidden"]

_MAX_PLANS = 256


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A layer call: who takes part, with what code and weights."""

    rows: tuple[int, ...]
    index: Tensor | None  # i64[n] on the device; None if all rows take part
    step: Step[Tensor]
    spec: KvSpec
    opens: tuple[tuple[int, int], ...]  # (row, how many blends)
    closes: tuple[tuple[int, tuple[float, ...]], ...]  # (row, their dampings)


@dataclass(frozen=True, slots=True)
class _Part:
    """Which steps a pass runs: those after the first `done`, up to `stop`; whether on one token a
    row; and whether the head runs on every token.
    """

    one_token: bool
    every: bool
    done: int
    stop: int | None

    @property
    def tokens(self) -> int:
        """Of the class of shapes: one, or several."""
        return 1 if self.one_token else 2


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """One pass over rows of certain programs: its layer calls, and where in the rows' tables,
    one below the other, the blocks of each call's rows are named.
    """

    start: Region
    head: Region
    start_last: Region
    calls: tuple[_Call, ...]
    places: Tensor
    sizes: list[int]
    in_place: bool  # whether some call serves a part of the rows


class RowBatch:
    """Some rows that run together. What a pass needs to know of them is kept while they stay."""

    def __init__(self, rows: Sequence[KvRow]) -> None:
        self.rows = tuple(rows)
        self.programs = tuple(row.program for row in self.rows)
        self._tables: dict[_Part, tuple[tuple[int, ...], int, list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self.rows]

    def close(self) -> None:
        """Give back every block."""
        for row in self.rows:
            row.close()

    def tables(self, plan: _Plan, part: _Part) -> tuple[int, list[Tensor]]:
        """How many blocks W, and i64[n, W] for each layer call."""
        versions = tuple(row.version for row in self.rows)
        known = self._tables.get(part)
        if known is None or known[0] != versions:
            # regions are compiled for two blocks or more
            width = max(2, max(row.num_blocks for row in self.rows))
            tables = self._stacked(width).index_select(0, plan.places)
            known = self._tables[part] = versions, width, list(tables.split(plan.sizes))
        return known[1], known[2]

    def padded_tables(self, plan: _Plan, spares: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """The same, and after them a block for what padding writes: of each row and step, that of
        `spares` i64[S].
        """
        width = max(2, 1 + max(row.num_blocks for row in self.rows))
        stacked = self._stacked(width)
        stacked[:, -1] = torch.cat(list(spares))
        return width, list(stacked.index_select(0, plan.places).split(plan.sizes))

    def _stacked(self, width: int) -> Tensor:
        """The rows' tables, one below the other, as wide as that."""
        own = []
        for row in self.rows:
            table = row.table[:, :width]
            own.append(pad(table, (0, width - table.shape[1]), value=EMPTY))
        return torch.cat(own)


class Lockstep:
    """Runs rows on the regions of a table; compiles what is missing, as linking does."""

    def __init__(self, library: LayerLibrary, regions: RegionTable) -> None:
        self.library, self.regions = library, regions
        self.store = KvStore(library.device)
        axes = [self._batch_axes(call) for call in library.table.calls()]
        self.possible = None not in axes
        self._axes = {number: axis for of_call in axes for number, axis in of_call or ()}
        self._plans: OrderedDict[tuple[tuple[Program, ...], _Part], _Plan] = OrderedDict()

    def row(self, program: Program) -> KvRow:
        """An empty row."""
        return KvRow(self.store, self.library.table.kv_specs, program)

    def _batch_axes(self, call: Symbol) -> list[tuple[int, int | None]] | None:
        """The axis of the batch in each side value that a call takes; None if one cannot be told.

        Some models fold the rows of a batch into another axis, such as that of heads.
        """
        operands = self.library.table.bodies[call.target].operands
        sides = [operand for operand in operands if operand.role in ("side", "input")]
        axes: list[tuple[int, int | None]] = []
        for number, operand in zip(call.sides, sides, strict=True):
            found = [i for i, name in operand.axes().items() if name == "batch"]
            if len(found) > 1 or (not found and any("B" in size for size in operand.size)):
                return None
            axes.append((number, found[0] if found else None))
        return axes

    def calls(self, program: Program, shape: ShapeClass) -> list[RegionName]:
        """The regions that one pass over rows of one program calls, in order, for the logits of a
        token each.
        """
        shape = replace(shape, length=None)
        start, head = self.library.prologue.target, self.library.epilogue.target
        layers = [self.library.layers[layer].target for layer in program.path]
        several = [RegionName(name, shape) for name in (start, *layers)]
        last = (head,) if shape == shape.decode else (start, head)
        return several + [RegionName(name, shape.decode) for name in last]

    def _ends(self, batch: int, part: _Part) -> list[RegionName]:
        """Prologue and epilogue of a pass, and the prologue for one token a row."""
        shape = ShapeClass.of(batch, part.tokens, None)
        start, head = self.library.prologue.target, self.library.epilogue.target
        return [
            RegionName(start, shape),
            RegionName(head, shape if part.every else shape.decode),
            RegionName(start, shape.decode),
        ]

    def _later(
        self, programs: Sequence[Program], order: Sequence[LayerCall], part: _Part
    ) -> list[RegionName]:
        """What later passes over these rows may call: asked for together, it is compiled together.

        Decoding follows a prompt. Rows of different programs meet in calls of one row or several.
        """
        sizes = {len(programs)} if len(set(programs)) == 1 else {1, 2}
        counts = (1,) if part.one_token else (1, 2)
        targets = dict.fromkeys(self.library.layers[call.layer].target for call in order)
        later = []
        for size in sizes:
            later.append(self._ends(size, part)[2])
            for tokens in counts:
                shape = ShapeClass.of(size, tokens, None)
                later += [RegionName(target, shape) for target in targets]
        return later + [name for size in sizes for name in self._ends(size, part)]

    @torch.no_grad()
    def run(
        self,
        batch: RowBatch,
        ids: Tensor,
        counts: Sequence[int],
        wants: Wants = "last",
        after: tuple[int, Tensor] | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """One pass over the next counts[b] of ids i64[B, T] of each row.

        Returns logits [B, 1, V] or [B, T, V], or hidden states [B, T, d]. `after` gives how many
        steps these tokens have made already, and the hidden states [B, T, d] after them; `stop`
        ends each program after so many steps.
        """
        with self.store.lock:  # a store that grows is replaced: no other pass may be writing to it
            return self._run(batch, ids, counts, wants, after, stop)

    def _run(
        self,
        batch: RowBatch,
        ids: Tensor,
        counts: Sequence[int],
        wants: Wants,
        after: tuple[int, Tensor] | None,
        stop: int | None,
    ) -> Tensor:
        tokens = ids.shape[1]
        done = 0 if after is None else after[0]
        part = _Part(tokens == 1, wants == "every" and tokens > 1, done, stop)
        for row, count in zip(batch.rows, counts, strict=True):
            row.make_room(count)
        plan = self._plan(batch.programs, part)
        with self._tables(batch, plan, part, counts, tokens) as (blocks, tables):
            inputs = self._inputs(batch, ids, counts, blocks * BLOCK)
            values = self._start(plan.start, inputs)
            hidden = values[HIDDEN] if after is None else after[1]
            hidden = self._steps(plan, tables, values, hidden, len(batch))
        for row, count in zip(batch.rows, counts, strict=True):
            row.length += count
        if wants == "hidden":
            return hidden
        if wants == "every" or tokens == 1:
            return self._head(plan.head, hidden, values)
        rows = torch.arange(len(batch), device=ids.device)
        last = torch.tensor(counts, device=ids.device).clamp(min=1) - 1

        def pick(tensor: Tensor) -> Tensor:
            return tensor[rows, last][:, None]

        one = [pick(inputs[0]), pick(inputs[1]), inputs[2]]
        return self._head(plan.head, pick(hidden), self._start(plan.start_last, one))

    @contextmanager
    def _tables(
        self, batch: RowBatch, plan: _Plan, part: _Part, counts: Sequence[int], tokens: int
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """How many blocks W, and i64[n, W] for each layer call; the last ones are for padding, if
        there is any.
        """
        if min(counts) == tokens:
            yield batch.tables(plan, part)
            return
        with ExitStack() as stack:
            spares = []
            for row, count in zip(batch.rows, counts, strict=True):
                if count < tokens:
                    spares.append(row.spare())
                    stack.callback(row.give_spare, spares[-1])
                else:
                    spares.append(torch.full((len(row.table),), EMPTY))
            yield batch.padded_tables(plan, spares)

    @property
    def programs(self) -> set[Program]:
        """Those of which a plan is kept."""
        with self.store.lock:
            return {program for programs, _ in self._plans for program in programs}

    def _plan(self, programs: tuple[Program, ...], part: _Part) -> _Plan:
        key = programs, part
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = self._make_plan(programs, part)
            if len(self._plans) > _MAX_PLANS:  # made again, it costs little
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _make_plan(self, programs: tuple[Program, ...], part: _Part) -> _Plan:
        order = lockstep_calls(programs, part.done, part.stop)
        wanted: list[RegionName] = []
        for call in order:
            shape = ShapeClass.of(len(call.rows), part.tokens, None)
            wanted.append(RegionName(self.library.layers[call.layer].target, shape))
        ends = self._ends(len(programs), part)
        start, _, _ = ends
        found = self.regions.get([start, *wanted, *self._later(programs, order, part), *ends])
        of_program = {program: program.schedule() for program in programs}
        schedules = [of_program[program] for program in programs]
        offsets = [0]
        for program in programs:
            offsets.append(offsets[-1] + program.num_steps)
        calls, places = [], []
        for call, of_call in zip(order, wanted, strict=True):
            calls.append(self._call(call, schedules, found[of_call]))
            places += [offsets[r] + s for r, s in zip(call.rows, call.steps, strict=True)]
        start, head, start_last = (found[end] for end in ends)
        return _Plan(
            start,
            head,
            start_last,
            tuple(calls),
            torch.tensor(places, dtype=torch.long),
            [len(call.rows) for call in order],
            any(call.index is not None for call in calls),
        )

    def _call(
        self, call: LayerCall, schedules: Sequence[tuple[ScheduledStep, ...]], region: Region
    ) -> _Call:
        opens, closes = [], []
        for row, step in zip(call.rows, call.steps, strict=True):
            scheduled = schedules[row][step]
            if scheduled.opens:
                opens.append((row, scheduled.opens))
            if scheduled.closes:
                closes.append((row, scheduled.closes))
        everyone = len(call.rows) == len(schedules)
        layer = self.library.layers[call.layer]
        return _Call(
            call.rows,
            None if everyone else torch.tensor(call.rows, device=self.store.device),
            layer.step(region),
            self.library.table.kv_specs[call.layer],
            tuple(opens),
            tuple(closes),
        )

    def _inputs(
        self, batch: RowBatch, ids: Tensor, counts: Sequence[int], width: int
    ) -> list[Tensor]:
        """Token ids, positions and columns; padding is sent to the last column."""
        device, tokens = ids.device, ids.shape[1]
        positions = torch.tensor(batch.lengths, device=device)[:, None]
        offsets = torch.arange(tokens, device=device)
        if tokens > 1:
            positions = positions + offsets
        if min(counts) < tokens:
            own = torch.tensor(counts, device=device)[:, None]
            positions = torch.where(offsets < own, positions, width - 1)
        return [ids.contiguous(), positions, torch.arange(width, device=device)]

    def _start(self, region: Region, inputs: list[Tensor]) -> list[Tensor]:
        return side_values(region, inputs, self.library.prologue.weights)

    def _head(self, region: Region, hidden: Tensor, values: Sequence[Tensor]) -> Tensor:
        return self.library.epilogue.step(region).run(hidden, values)

    def _steps(
        self,
        plan: _Plan,
        tables: Sequence[Tensor],
        values: list[Tensor],
        hidden: Tensor,
        batch: int,
    ) -> Tensor:
        """The hidden state [B, T, d] after every row's last step."""
        if plan.in_place:
            hidden = hidden.clone()  # it is written row by row
        blends = [Blends(torch.lerp) for _ in range(batch)]
        chosen: dict[tuple[int, ...], list[Tensor]] = {}  # several calls serve the same rows
        stores: dict[KvSpec, tuple[Tensor, Tensor]] = {}
        for call, table in zip(plan.calls, tables, strict=True):
            for row, opens in call.opens:
                blends[row].open(hidden[row].clone(), opens)
            if (store := stores.get(call.spec)) is None:
                store = stores[call.spec] = self.store.tensors(call.spec)
            if call.index is None:
                hidden = call.step.run(hidden, values, (*store, table))
            else:
                if call.rows not in chosen:
                    chosen[call.rows] = self._of_rows(values, call.index)
                state = hidden.index_select(0, call.index)
                state = call.step.run(state, chosen[call.rows], (*store, table))
                hidden.index_copy_(0, call.index, state)
            for row, dampings in call.closes:
                hidden[row] = blends[row].close(hidden[row], dampings)
        return hidden

    def _of_rows(self, values: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        """The side values of some rows."""
        found = list(values)
        for number, axis in self._axes.items():
            if axis is not None:
                found[number] = values[number].index_select(axis, index)
        return found
