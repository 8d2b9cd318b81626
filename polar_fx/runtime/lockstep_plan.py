"""What a pass over rows of certain programs runs: its layer calls, with code, weights and places.

A plan is made once for some programs and kept, so that a pass only runs it.

Shape legend: n rows of a call.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.base import Region, RegionName, ShapeClass
from ..capture import KvSpec
from ..library import LayerLibrary
from ..library.steps import Step
from ..program import Program
from ..program import Step as ScheduledStep
from .link import region_calls
from .lockstep_order import LayerCall, lockstep_calls
from .regions import RegionTable

_MAX_PLANS = 256


@dataclass(frozen=True, slots=True, eq=False)
class PlannedCall:
    """A layer call: who takes part, with what code and weights."""

    rows: tuple[int, ...]
    index: Tensor | None  # i64[n] on the device; None if all rows take part
    step: Step[Tensor]
    spec: KvSpec
    opens: tuple[tuple[int, int], ...]  # (row, how many blends)
    closes: tuple[tuple[int, tuple[float, ...]], ...]  # (row, their dampings)


@dataclass(frozen=True, slots=True)
class Part:
    """Which steps a pass runs: those after the first `done`, up to `stop`; whether on one token a
    row; and whether something of every token is wanted, or at most the logits of one token a row.
    """

    one_token: bool
    every: bool
    done: int = 0
    stop: int | None = None

    @property
    def tokens(self) -> int:
        """Of the class of shapes: one, or several."""
        return 1 if self.one_token else 2


# a token of every row through all of its program, for its logits
DECODE = Part(one_token=True, every=False)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One pass over rows of certain programs: its layer calls, and where in the rows' tables,
    one below the other, the blocks of each call's rows are named.

    Where logits of one token a row are all that is wanted and every row ends with the same calls,
    those of them are not in `calls` that only read keys and values, and the one before these, whose
    keys and values of all tokens `kv_writes` writes: `last` runs them for one token a row, as if
    that were decoded.
    """

    start: Region
    head: Region
    start_last: Region
    calls: tuple[PlannedCall, ...]
    kv_writes: Step[Tensor] | None
    last: tuple[PlannedCall, ...]
    places: Tensor
    sizes: list[int]


class Planner:
    """Makes plans and keeps the latest; compiles what is missing, as linking does."""

    def __init__(self, library: LayerLibrary, regions: RegionTable) -> None:
        self.library, self.regions = library, regions
        self._plans: OrderedDict[tuple[tuple[Program, ...], Part], Plan] = OrderedDict()

    def calls(self, program: Program, shape: ShapeClass) -> list[RegionName]:
        """The regions that one pass over rows of one program calls, in order, for the logits of a
        token each.
        """
        by_address = replace(shape, length=None)
        return region_calls(
            self.library.table, program, shape=by_address, every=shape == shape.decode
        )

    def programs(self) -> set[Program]:
        """Those of which a plan is kept."""
        return {program for programs, _ in self._plans for program in programs}

    def plan(self, programs: tuple[Program, ...], part: Part) -> Plan:
        """That of a part of these programs. Raises as `RegionTable.get` does."""
        key = programs, part
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = self._made(programs, part)
            if len(self._plans) > _MAX_PLANS:  # made again, it costs little
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _made(self, programs: tuple[Program, ...], part: Part) -> Plan:
        order = lockstep_calls(programs, part.done, stop=part.stop)
        names = [self._name(call, part) for call in order]
        start, head, start_last = ends = self._ends(len(programs), part)
        num_last, cut = self._ending(order, part, batch=len(programs))
        most = len(order) - num_last
        short = [replace(names[most], kv_writes=True)] if cut else []
        later = self._later(programs, order, part=part, num_last=num_last)
        found = self.regions.get([start, *names[:most], *short, *later, *ends])
        of_program = {program: program.schedule() for program in programs}
        schedules = [of_program[program] for program in programs]
        offsets = [0]
        for program in programs:
            offsets.append(offsets[-1] + program.num_steps)
        sources = self._sources(programs)
        places = [
            offsets[row] + sources[row][step]
            for call in order
            for row, step in zip(call.rows, call.steps, strict=True)
        ]
        names[most:] = [replace(name, shape=name.shape.decode) for name in names[most:]]
        calls: list[PlannedCall] = []
        for call, name in zip(order, names, strict=True):
            calls.append(self._call(call, schedules, region=found[name]))
        kv_writes = self.library.layers[order[most].layer].step(found[short[0]]) if cut else None
        return Plan(
            found[start],
            found[head],
            found[start_last],
            tuple(calls[:most]),
            kv_writes,
            tuple(calls[most:]),
            torch.tensor(places, dtype=torch.long),
            [len(call.rows) for call in order],
        )

    def _ending(self, order: Sequence[LayerCall], part: Part, *, batch: int) -> tuple[int, bool]:
        """How many calls at the end run for one token a row alone, and whether the first of them
        runs for the keys and values of all tokens before.
        """
        if part.every or part.one_token:
            return 0, False
        # calls of all rows at the end are the last ones of each
        ends = itertools.takewhile(lambda call: len(call.rows) == batch, reversed(order))
        layers = [call.layer for call in ends]
        return self.library.table.ending(layers[::-1])

    def _sources(self, programs: Sequence[Program]) -> list[Sequence[int]]:
        """For each step of each program the one whose blocks it takes."""
        table = self.library.table
        found = {program: table.slot_steps(program) for program in dict.fromkeys(programs)}
        return [found[program] for program in programs]

    def _name(self, call: LayerCall, part: Part) -> RegionName:
        shape = ShapeClass.of(len(call.rows), part.tokens, None)
        return RegionName(self.library.layers[call.layer].target, shape)

    def _ends(self, batch: int, part: Part) -> list[RegionName]:
        """Prologue and epilogue of a pass, and the prologue for one token a row."""
        shape = ShapeClass.of(batch, part.tokens, None)
        start, head = self.library.prologue.target, self.library.epilogue.target
        return [
            RegionName(start, shape),
            RegionName(head, shape if part.every else shape.decode),
            RegionName(start, shape.decode),
        ]

    def _later(
        self, programs: Sequence[Program], order: Sequence[LayerCall], *, part: Part, num_last: int
    ) -> list[RegionName]:
        """What later passes over these rows may call: asked for together, it is compiled together.

        Decoding follows a prompt. Rows of different programs meet in calls of one row or several.
        """
        sizes = {len(programs)} if len(set(programs)) == 1 else {1, 2}
        one = dict.fromkeys(self.library.layers[call.layer].target for call in order)
        many = dict.fromkeys(
            self.library.layers[call.layer].target for call in order[: len(order) - num_last]
        )
        later = []
        for size in sizes:
            later.append(self._ends(size, part)[2])
            later += [RegionName(target, ShapeClass.of(size, 1, None)) for target in one]
            if not part.one_token:
                later += [RegionName(target, ShapeClass.of(size, 2, None)) for target in many]
        return later + [name for size in sizes for name in self._ends(size, part)]

    def _call(
        self, call: LayerCall, schedules: Sequence[tuple[ScheduledStep, ...]], *, region: Region
    ) -> PlannedCall:
        everyone = len(call.rows) == len(schedules)
        layer = self.library.layers[call.layer]
        opens, closes = blends_of(call, schedules)
        return PlannedCall(
            call.rows,
            None if everyone else torch.tensor(call.rows, device=self.library.device),
            layer.step(region),
            self.library.table.slot_spec(call.layer),
            opens,
            closes,
        )


def blends_of(
    call: LayerCall, schedules: Sequence[tuple[ScheduledStep, ...]]
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, tuple[float, ...]], ...]]:
    """The blends of a call's rows: how many open before it, and the dampings of those that close
    after it, each with its row.
    """
    opens, closes = [], []
    for row, step in zip(call.rows, call.steps, strict=True):
        scheduled = schedules[row][step]
        if scheduled.opens:
            opens.append((row, scheduled.opens))
        if scheduled.closes:
            closes.append((row, scheduled.closes))
    return tuple(opens), tuple(closes)
