"""What a pass over rows of certain programs runs: its layer calls, with code, weights and places.

A plan is made once for some programs and kept, so that a pass only runs it.

Shape legend: n rows of a call.
"""

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

    Where logits of one token a row are all that is wanted and every row ends with the same call,
    that call is not in `calls`: `kv_writes` writes its keys and values of all tokens, and `last`
    runs it for one token a row, as if that were decoded.
    """

    start: Region
    head: Region
    start_last: Region
    calls: tuple[PlannedCall, ...]
    kv_writes: Step[Tensor] | None
    last: PlannedCall | None
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
        # a call of all rows at the end is the last of each
        is_short = (
            not (part.every or part.one_token)
            and len(order[-1].rows) == len(programs)
            and self.library.table.ends_in_kv_writes(order[-1].layer)
        )
        short = [replace(names[-1], kv_writes=True)] if is_short else []
        wanted = [start, *names[: len(names) - len(short)], *short]
        found = self.regions.get(
            [*wanted, *self._later(programs, order, part=part, is_short=is_short), *ends]
        )
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
        kv_writes = last = None
        most = len(order) - len(short)
        calls = [
            self._call(call, schedules, region=found[name])
            for call, name in zip(order[:most], names[:most], strict=True)
        ]
        if is_short:
            one = names[-1].shape.decode
            last = self._call(order[-1], schedules, region=found[replace(names[-1], shape=one)])
            kv_writes = self.library.layers[order[-1].layer].step(found[short[0]])
        return Plan(
            found[start],
            found[head],
            found[start_last],
            tuple(calls),
            kv_writes,
            last,
            torch.tensor(places, dtype=torch.long),
            [len(call.rows) for call in order],
        )

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
        self, programs: Sequence[Program], order: Sequence[LayerCall], *, part: Part, is_short: bool
    ) -> list[RegionName]:
        """What later passes over these rows may call: asked for together, it is compiled together.

        Decoding follows a prompt. Rows of different programs meet in calls of one row or several.
        """
        sizes = {len(programs)} if len(set(programs)) == 1 else {1, 2}
        one = dict.fromkeys(self.library.layers[call.layer].target for call in order)
        many = dict.fromkeys(
            self.library.layers[call.layer].target for call in order[: len(order) - is_short]
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
