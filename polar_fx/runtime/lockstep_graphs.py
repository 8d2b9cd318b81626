"""Captured decodes of rows in lock-step: on CUDA a token of each row is one launch, whatever
programs the rows run.

What is captured is an order of layers. Which rows take part in a call, and where their keys and
values lie, is data that lies in buffers: rows may come, go and change places without a new capture
as long as the order of layers that holds their programs stays. A row that does not take part in a
call runs along, writes into a spare block, and keeps its hidden state.

Shape legend: B rows, padded to a size that is captured; C layer calls; W blocks; L columns; V
vocabulary.
"""

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from ..backends.base import Region, RegionName, ShapeClass
from ..capture import KvSpec
from ..library import LayerLibrary
from ..library.steps import HIDDEN, Blends, Step, side_values
from ..passes.address_kv import BLOCK
from ..program import Program
from .graph_cache import Captured, GraphCache
from .kv_store import KvStore
from .lockstep_order import LayerCall, lockstep_calls
from .lockstep_plan import blends_of
from .lockstep_rows import RowBatch, padded_size
from .on_device import on_device
from .regions import RegionTable

_KIND = "lock-step"
_MAX_ORDERS = 256


@dataclass(frozen=True, eq=False)
class _Call:
    """A layer call of all rows, and the blends of rows that open before it and close after it."""

    step: Step[Tensor]
    spec: KvSpec
    opens: tuple[tuple[int, int], ...]
    closes: tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True, eq=False)
class _Order:
    """What rows of some programs run together: `union` holds the layers in order.

    `places` i64[C * B] says where the blocks of each call and row are named: in the tables of the
    rows' steps, one below the other, and then those of the spare blocks. `takes_part` is a
    bool[C, B]; `is_full` if all rows take part everywhere.
    """

    union: Program
    calls: tuple[_Call, ...]
    start: Region
    head: Step[Tensor]
    places: Tensor
    takes_part: Tensor
    is_full: bool

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What a graph depends on, sizes apart."""
        blends = tuple((call.opens, call.closes) for call in self.calls)
        return self.union, self.is_full, blends

    @property
    def code(self) -> set[Hashable]:
        """What decides the kernels of a run, sizes apart."""
        marks: set[Hashable] = {("full", self.is_full)}
        if any(call.closes for call in self.calls):
            marks.add("blend")
        return {self.start, self.head.code, *(call.step.code for call in self.calls)} | marks


@dataclass(eq=False)
class _Buffers:
    """What goes in and comes out at fixed addresses: ids and positions i64[B, 1], columns i64[L],
    tables i64[C, B, W], who takes part bool[C, B], logits [B, 1, V].

    `filled_for` tells for which batch, and which blocks of it, the tables are.
    """

    ids: Tensor
    positions: Tensor
    columns: Tensor
    tables: Tensor
    takes_part: Tensor
    logits: Tensor | None = None
    filled_for: tuple[ref[RowBatch], tuple[int, ...]] | None = None

    @classmethod
    @torch.inference_mode(False)  # or they could not be filled outside of inference mode again
    def of(cls, sizes: "_Sizes", device: torch.device) -> "_Buffers":
        """Zeros."""
        ids = torch.zeros(sizes.rows, 1, dtype=torch.long, device=device)
        tables = ids.new_zeros(sizes.calls, sizes.rows, sizes.width)
        takes_part = torch.zeros(sizes.calls, sizes.rows, dtype=torch.bool, device=device)
        columns = torch.arange(sizes.width * BLOCK, device=device)
        return cls(ids, ids.clone(), columns, tables, takes_part)


@dataclass(frozen=True)
class _Sizes:
    """Calls, rows and blocks of a graph."""

    calls: int
    rows: int
    width: int


@dataclass(frozen=True, eq=False)
class _Held:
    """What must outlive a graph: its buffers, and the weights that it reads."""

    order: _Order
    buffers: _Buffers


class LockstepGraphs:
    """Runs decodes of rows in lock-step as graphs of a `GraphCache`.

    The first run of an order of layers, a number of rows and a width is captured. Sizes are rounded
    up, so that few of them occur.
    """

    def __init__(
        self, cache: GraphCache, library: LayerLibrary, *, regions: RegionTable, store: KvStore
    ) -> None:
        self.cache, self.library, self.regions, self.store = cache, library, regions, store
        table = library.table
        self._specs = tuple(dict.fromkeys(map(table.slot_spec, range(library.depth))))
        self._orders: OrderedDict[tuple[tuple[Program, ...], int], _Order] = OrderedDict()
        self._loaded: set[Hashable] = set()
        self._outputs: dict[int, tuple[torch.Size, torch.dtype]] = {}  # by number of rows
        self._stores: tuple[int, ...] = ()

    def run(self, batch: RowBatch, ids: Tensor) -> Tensor | None:
        """Logits [n, 1, V] after one more token i64[n, 1] of each of the batch's n rows, whose
        blocks are there; None where this is not to be captured.

        Raises as `RegionTable.get` does.
        """
        most = max(row.num_blocks for row in batch.rows)
        rows, width = padded_size(len(batch)), padded_size(max(2, most))
        order = self._order(batch.programs, rows)
        sizes = _Sizes(len(order.calls), rows, width)
        with self.cache.lock:
            spares = [self.store.spare(spec) for spec in self._specs]
            self._drop_those_of_former_stores()
            key = _KIND, order.kind, sizes
            captured = self.cache.find(key)
            if captured is None:
                if not self.cache.is_worthwhile((_KIND, order.kind, rows)):
                    return None
                held = _Held(order, _Buffers.of(sizes, self.store.device))
            else:
                held = captured.held
            self.cache.wait()
            self._fill(held.buffers, order, batch=batch, ids=ids, spares=spares)
            if captured is None:
                captured, logits = self._capture(key, held, sizes=sizes)
                if logits is not None:
                    return logits[: len(batch)]
                if captured is None:
                    return None
            self.cache.mark(key, captured)
            captured.graph.replay()
            assert held.buffers.logits is not None
            return held.buffers.logits[: len(batch)].clone()

    def _capture(
        self, key: Hashable, held: _Held, *, sizes: _Sizes
    ) -> tuple[Captured | None, Tensor | None]:
        """The graph, and the logits of an ordinary run before it, which loads the kernels on the
        device if they may be missing: a capture must not do that.
        """
        code = {(sizes.rows, sizes.width, part) for part in held.order.code}
        out, logits = self._outputs.get(sizes.rows), None
        if out is None or not code <= self._loaded:
            logits = self._compute(held)
            out = self._outputs[sizes.rows] = logits.shape, logits.dtype
            self._loaded |= code
        with torch.inference_mode(False):
            buffer = torch.empty(out[0], dtype=out[1], device=self.store.device)
        held.buffers.logits = buffer
        captured = self.cache.capture(
            key,
            lambda: buffer.copy_(self._compute(held)),
            program=held.order.union,
            batch=sizes.rows,
            held=held,
            subject=(_KIND, held.order.kind, sizes.rows),
        )
        return captured, logits

    def _compute(self, held: _Held) -> Tensor:
        """Logits [B, 1, V] of what the buffers hold; writes keys and values."""
        order, buffers = held.order, held.buffers
        inputs = [buffers.ids, buffers.positions, buffers.columns]
        values = side_values(order.start, inputs, weights=self.library.prologue.weights)
        hidden, blends = values[HIDDEN], defaultdict[int, Blends[Tensor]](_new_blends)
        for number, call in enumerate(order.calls):
            for row, count in call.opens:
                blends[row].open(hidden[row].clone(), count)
            slot = *self.store.tensors(call.spec), buffers.tables[number]
            after = call.step.run(hidden, values, slot=slot)
            if not order.is_full:
                takes_part = buffers.takes_part[number].view(-1, *[1] * (hidden.dim() - 1))
                after = torch.where(takes_part, after, hidden)
            for row, dampings in call.closes:
                after[row] = blends[row].close(after[row], dampings)
            hidden = after
        return order.head.run(hidden, values)

    def _fill(
        self,
        buffers: _Buffers,
        order: _Order,
        *,
        batch: RowBatch,
        ids: Tensor,
        spares: Sequence[int],
    ) -> None:
        """Let the buffers hold a token of each row and where its keys and values lie; in calls that
        a row takes no part in, it writes to a block of `spares`.
        """
        buffers.ids[: len(batch)].copy_(ids)
        buffers.positions[: len(batch)].copy_(batch.positions)
        known = buffers.filled_for
        if known is not None and known[0]() is batch and known[1] == batch.versions:
            return
        width, device = buffers.tables.shape[-1], self.store.device
        spare = torch.tensor(spares)[:, None].expand(-1, width)
        tables = torch.cat((batch.stacked(width), spare)).index_select(0, order.places)
        buffers.tables.view(-1, width).copy_(on_device(tables, device))
        buffers.takes_part.copy_(on_device(order.takes_part, device))
        buffers.filled_for = ref(batch), batch.versions

    def _drop_those_of_former_stores(self) -> None:
        """A store that grew lies elsewhere: graphs would go on writing to where it was."""
        places: list[int] = []
        for spec in self._specs:
            for part in self.store.tensors(spec):
                places += part.data_ptr(), len(part)
        if (stores := tuple(places)) != self._stores:
            self.cache.drop(lambda key: isinstance(key, tuple) and key[0] == _KIND)
            self._stores = stores

    def _order(self, programs: tuple[Program, ...], rows: int) -> _Order:
        """That of some programs, one a row, made for so many rows. Raises as `RegionTable.get`."""
        key = programs, rows
        if key not in self._orders:
            self._orders[key] = self._made(programs, rows)
            if len(self._orders) > _MAX_ORDERS:  # made again, it costs little
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _made(self, programs: tuple[Program, ...], rows: int) -> _Order:
        library, order = self.library, lockstep_calls(programs)
        shape = ShapeClass.of(rows, 1, None)
        start, head = (
            RegionName(part.target, shape) for part in (library.prologue, library.epilogue)
        )
        names = [RegionName(library.layers[call.layer].target, shape) for call in order]
        found = self.regions.get([start, *names, head])
        schedules = [program.schedule() for program in programs]
        calls: list[_Call] = []
        for call, name in zip(order, names, strict=True):
            opens, closes = blends_of(call, schedules)
            step = library.layers[call.layer].step(found[name])
            calls.append(_Call(step, library.table.slot_spec(call.layer), opens, closes))
        union = Program.from_path([call.layer for call in order], library.depth)
        return _Order(
            union,
            tuple(calls),
            found[start],
            library.epilogue.step(found[head]),
            self._places(programs, order, rows=rows),
            _takes_part(order, rows),
            all(len(call.rows) == len(programs) for call in order),
        )

    def _places(
        self, programs: Sequence[Program], order: Sequence[LayerCall], *, rows: int
    ) -> Tensor:
        """Where the blocks of each call and row are named, i64[C * B] (see `_Order`)."""
        steps = list(itertools.accumulate((p.num_steps for p in programs), initial=0))
        table = self.library.table
        sources = [table.slot_steps(program) for program in programs]
        found: list[int] = []
        for call in order:
            own = [steps[-1] + self._specs.index(table.slot_spec(call.layer))] * rows
            for row, step in zip(call.rows, call.steps, strict=True):
                own[row] = steps[row] + sources[row][step]
            found += own
        return torch.tensor(found)


def _takes_part(order: Sequence[LayerCall], rows: int) -> Tensor:
    """Which rows take part in each call, bool[C, B]."""
    found = torch.zeros(len(order), rows, dtype=torch.bool)
    for number, call in enumerate(order):
        found[number, list(call.rows)] = True
    return found


def _new_blends() -> Blends[Tensor]:
    return Blends(torch.lerp)
