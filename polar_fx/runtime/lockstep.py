"""Rows of different programs in one batch, in lock-step: every layer call serves all rows whose
next step it is.

Keys and values lie by row and step in a `KvStore`, so any rows, at whatever steps of their
programs, are one call; attention reads as many columns as the longest row has.

Shape legend: B rows, T tokens, W blocks, L columns, d hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor

from ..backends.base import Region
from ..library import LayerLibrary
from ..library.steps import HIDDEN, Blends, side_values
from ..passes.address_kv import BLOCK
from ..program import Program
from .graph_cache import GraphCache
from .kv_rows import KvRow
from .kv_store import EMPTY, KvStore
from .kv_windows import Ask, KvWindows
from .link import tokens_at
from .lockstep_graphs import LockstepGraphs
from .lockstep_plan import DECODE, Part, Plan, PlannedCall, Planner
from .lockstep_rows import RowBatch
from .regions import RegionTable
from .row_length import takes_blocks

# What of a pass is wanted: logits of each row's last token or of every token, or the hidden states
# after the last step.
Wants = Literal["last", "every", "hidden"]


class Lockstep:
    """Runs rows on the regions of a table; compiles what is missing, as linking does."""

    def __init__(self, library: LayerLibrary, regions: RegionTable) -> None:
        self.library, self.regions = library, regions
        self.store = KvStore(library.device)
        self.possible = takes_blocks(library, regions.backend)
        self.windows = KvWindows(library.table)
        self._axes = library.table.batch_axes() or {}
        self.plans = Planner(library, regions)
        self.graphs: LockstepGraphs | None = None  # replays decodes on a GPU

    def capture_in(self, cache: GraphCache | None) -> None:
        """Let decodes be graphs in a cache; without one, every kernel is launched by itself."""
        self.graphs = None
        if cache is not None:
            self.graphs = LockstepGraphs(
                cache, self.library, regions=self.regions, store=self.store
            )

    def row(self, program: Program) -> KvRow:
        """An empty row."""
        specs = self.library.table.kv_specs
        return KvRow(self.store, specs, program=program, windows=self.windows)

    @torch.no_grad()
    def run(
        self,
        batch: RowBatch,
        ids: Tensor,
        *,
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
            return self._run(batch, ids, counts=counts, wants=wants, after=after, stop=stop)

    @torch.no_grad()
    def write_kv(
        self,
        batch: RowBatch,
        ids: Tensor,
        *,
        counts: Sequence[int],
        after: tuple[int, Tensor] | None = None,
    ) -> None:
        """The same pass, for nothing but the keys and values that it writes."""
        with self.store.lock:
            self._run(batch, ids, counts=counts, wants=None, after=after, stop=None)

    def _run(
        self,
        batch: RowBatch,
        ids: Tensor,
        *,
        counts: Sequence[int],
        wants: Wants | None,
        after: tuple[int, Tensor] | None,
        stop: int | None,
    ) -> Tensor:
        ids, tokens = ids.to(self.store.device), ids.shape[1]
        done = 0 if after is None else after[0]
        part = Part(tokens == 1, wants in ("every", "hidden"), done, stop)
        plan = self.plans.plan(batch.programs, part)
        self.windows.look(
            max(batch.lengths), self._asked(plan.start_last, batch, device=ids.device)
        )
        for row, count in zip(batch.rows, counts, strict=True):
            row.make_room(count)
        decodes = part == DECODE and wants == "last" and after is None and min(counts) == 1
        if self.graphs is not None and decodes:
            logits = self.graphs.run(batch, ids)
            if logits is not None:
                batch.advance(counts)
                return logits
        blends = [Blends(torch.lerp) for _ in batch.rows]
        with self._tables(batch, plan, part=part, counts=counts, tokens=tokens) as (blocks, tables):
            inputs = self._inputs(batch, ids, counts=counts, width=blocks * BLOCK)
            values = self._start(plan.start, inputs)
            hidden = values[HIDDEN] if after is None else after[1]
            hidden = self._steps(plan.calls, tables, values=values, hidden=hidden, blends=blends)
            of_last = tables[len(plan.calls) :]
            if plan.kv_writes is not None:
                store = self.store.tensors(plan.last[0].spec)
                plan.kv_writes.run(hidden, values, slot=(*store, of_last[0]))
            if wants == "last" and tokens > 1:
                pick = tokens_at(torch.tensor(counts, device=ids.device).clamp(min=1) - 1)
                hidden = pick(hidden)
                blends = [b.each(_last_of(n)) for b, n in zip(blends, counts, strict=True)]
                values = self._start(plan.start_last, [*map(pick, inputs[:2]), inputs[2]])
                hidden = self._steps(
                    plan.last, of_last, values=values, hidden=hidden, blends=blends
                )
        batch.advance(counts)
        if wants is None or wants == "hidden":
            return hidden
        return self._head(plan.head, hidden, values=values)

    @contextmanager
    def _tables(
        self, batch: RowBatch, plan: Plan, *, part: Part, counts: Sequence[int], tokens: int
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
            return self.plans.programs()

    def _inputs(
        self, batch: RowBatch, ids: Tensor, *, counts: Sequence[int], width: int
    ) -> list[Tensor]:
        """Token ids, positions and columns; padding is sent to the last column."""
        device, tokens = ids.device, ids.shape[1]
        positions = batch.positions
        offsets = torch.arange(tokens, device=device)
        if tokens > 1:
            positions = positions + offsets
        if min(counts) < tokens:
            own = torch.tensor(counts, device=device)[:, None]
            positions = torch.where(offsets < own, positions, width - 1)
        return [ids.contiguous(), positions, torch.arange(width, device=device)]

    def _asked(self, region: Region, batch: RowBatch, *, device: torch.device) -> Ask:
        """Side values of a pass over one token a row, wherever it is."""

        def ask(position: int, width: int) -> list[Tensor]:
            ids = torch.zeros(len(batch), 1, dtype=torch.long, device=device)
            columns = torch.arange(width, device=device)
            return self._start(region, [ids, torch.full_like(ids, position), columns])

        return ask

    def _start(self, region: Region, inputs: list[Tensor]) -> list[Tensor]:
        return side_values(region, inputs, weights=self.library.prologue.weights)

    def _head(self, region: Region, hidden: Tensor, *, values: Sequence[Tensor]) -> Tensor:
        return self.library.epilogue.step(region).run(hidden, values)

    def _steps(
        self,
        calls: Sequence[PlannedCall],
        tables: Sequence[Tensor],
        *,
        values: list[Tensor],
        hidden: Tensor,
        blends: Sequence[Blends[Tensor]],
    ) -> Tensor:
        """The hidden state [B, T, d] of every row after these calls."""
        if any(call.index is not None for call in calls):
            hidden = hidden.clone()  # it is written row by row
        chosen: dict[tuple[int, ...], list[Tensor]] = {}  # several calls serve the same rows
        stores: dict[int, tuple[Tensor, ...]] = {}  # by identity: hashing a spec is slower
        for call, table in zip(calls, tables[: len(calls)], strict=True):
            for row, opens in call.opens:
                blends[row].open(hidden[row].clone(), opens)
            if (store := stores.get(id(call.spec))) is None:
                store = stores[id(call.spec)] = self.store.tensors(call.spec)
            if call.index is None:
                hidden = call.step.run(hidden, values, slot=(*store, table))
            else:
                if call.rows not in chosen:
                    chosen[call.rows] = self._of_rows(values, call.index)
                state = hidden.index_select(0, call.index)
                state = call.step.run(state, chosen[call.rows], slot=(*store, table))
                hidden.index_copy_(0, call.index, state)
            for row, dampings in call.closes:
                hidden[row] = blends[row].close(hidden[row], dampings)
        return hidden

    def _of_rows(self, values: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        """The side values of some rows."""
        found = list(values)
        for number, axis in self._axes.items():
            if axis is not None:
                found[number] = _selected(values[number], axis, index=index)
        return found


def _selected(value: Tensor, axis: int, *, index: Tensor) -> Tensor:
    """Some rows of a side value, laid out as it is: compiled code reads by its strides, which are
    those of a wider tensor where a layer takes a part of one.
    """
    if axis or value.is_contiguous() or 0 in value.stride():
        return value.index_select(axis, index)
    rows = value.new_empty_strided((len(index), *value.shape[1:]), value.stride())
    return torch.index_select(value, 0, index, out=rows)


def _last_of(count: int) -> Callable[[Tensor], Tensor]:
    """Takes the last of `count` tokens out of a value [T, ...] of one row: [1, ...]."""
    last = max(count, 1) - 1
    return lambda value: value[last : last + 1]
