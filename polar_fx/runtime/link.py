"""The linker: regions + a program -> a straight sequence of calls on shared weights.

A region is compiled once per body and shape class; linking a further program only looks regions up,
so it costs well under a millisecond and compiles nothing.

Shape legend: B batch, T tokens, d hidden size, V vocabulary.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import Region, ShapeClass
from ..errors import ProgramError
from ..library import LayerLibrary
from ..library.steps import HIDDEN, Blends, operands
from ..program import Program
from .kv_cache import KvPool, Resume
from .regions import KV_WRITES, RegionTable, Wanted

_MAX_LINKED = 1024


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What one pass over a linked program takes: `ids` and `positions` i64[B, T], and a slot of
    keys and values a step.

    `logits_at` i64[B] names the token of each row whose logits are wanted, for a program that is
    linked for one token per row. After a `resume` only the steps behind it run.
    """

    ids: Tensor
    positions: Tensor
    slots: Sequence[tuple[Tensor, Tensor]]
    logits_at: Tensor | None = None
    resume: Resume | None = None


@dataclass(frozen=True, slots=True)
class LinkedStep:
    """One executed layer: its code, its operands, and the blends that open before and close after
    it.
    """

    region: Region
    sides: tuple[int, ...]
    weights: tuple[Tensor, ...]
    opens: int
    closes: tuple[float, ...]

    def operands(
        self, hidden: Tensor, values: Sequence[Tensor], slot: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        return operands(hidden, values, self.sides, slot, self.weights)


@dataclass(frozen=True, slots=True)
class LinkedProgram:
    """A program bound to the regions of one shape class.

    It is linked either for the logits of every token, or for those of one token per row: `last` is
    then the same program for one token, and `kv_writes` the last step's KV writes for all tokens.
    """

    program: Program
    prologue: Region
    prologue_weights: tuple[Tensor, ...]
    steps: tuple[LinkedStep, ...]
    epilogue: LinkedStep | None
    kv_index: Tensor
    kv_writes: Region | None = None
    last: "LinkedProgram | None" = None

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits [B, T, V] of every token, or [B, 1, V] of the tokens `logits_at`; writes the slots
        in place.

        Raises ProgramError for slots that are not one a step.
        """
        self._check(inputs)
        if self.last is not None:
            return self._run_last(self.last, inputs)
        values = self._start(inputs.ids, inputs.positions)
        hidden, _ = self._through(self.steps, values, inputs.slots, inputs.resume)
        return self._head(hidden, values)

    def write_kv(self, inputs: StepInputs) -> None:
        """Write every step's keys and values, and compute nothing that only logits need.

        Of a program linked for one token per row. Raises ProgramError as `run` does.
        """
        self._check(inputs)
        values = self._start(inputs.ids, inputs.positions)
        self._all_but_last(values, inputs)

    def states(self, inputs: StepInputs) -> Iterator[Tensor]:
        """The hidden states [B, T, d] before the first step, and then after each; a step runs when
        the state after it is asked for.

        Of a program linked for one token per row, all but the last.
        """
        values = self._start(inputs.ids, inputs.positions)
        yield values[HIDDEN]
        blends = Blends(torch.lerp)
        yield from self._states(self.steps, values[HIDDEN], values, inputs.slots, blends)

    def _check(self, inputs: StepInputs) -> None:
        """Never run a program on another one's slots: steps would be left out."""
        if len(inputs.slots) != len(self.steps):
            raise ProgramError(
                f"program {self.program} has {len(self.steps)} steps but the session "
                f"{len(inputs.slots)} slots; open a session for this program"
            )

    def _run_last(self, last: "LinkedProgram", inputs: StepInputs) -> Tensor:
        """What comes after the last step's keys and values, for one token per row alone, as if it
        were decoded.
        """
        where = inputs.logits_at
        assert where is not None
        values = self._start(inputs.ids, inputs.positions)
        hidden, blends = self._all_but_last(values, inputs)
        rows = torch.arange(len(where), device=where.device)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[rows, where][:, None]

        values = last._start(pick(inputs.ids), pick(inputs.positions))
        steps, slots = last.steps[-1:], inputs.slots[-1:]
        hidden = pick(hidden)
        for after in last._states(steps, hidden, values, slots, blends.each(pick)):
            hidden = after
        return last._head(hidden, values)

    def _all_but_last(
        self, values: Sequence[Tensor], inputs: StepInputs
    ) -> tuple[Tensor, Blends[Tensor]]:
        """The hidden state before the last step, and the blends that are open there; all steps'
        keys and values are written.
        """
        assert self.kv_writes is not None
        hidden, blends = self._through(self.steps[:-1], values, inputs.slots[:-1], inputs.resume)
        self.kv_writes(self.steps[-1].operands(hidden, values, inputs.slots[-1]))
        return hidden, blends

    def _start(self, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """The side values."""
        inputs = [input_ids, positions, self.kv_index]
        return [*inputs, *self.prologue([*inputs, *self.prologue_weights])]

    def _through(
        self,
        steps: Sequence[LinkedStep],
        values: Sequence[Tensor],
        slots: Sequence[tuple[Tensor, Tensor]],
        resume: Resume | None,
    ) -> tuple[Tensor, Blends[Tensor]]:
        """The hidden state after these steps, and the blends that are open there."""
        hidden, blends = values[HIDDEN], Blends(torch.lerp)
        if resume is not None:
            hidden = resume.hidden
            steps, slots = steps[resume.num_steps :], slots[resume.num_steps :]
        for after in self._states(steps, hidden, values, slots, blends):
            hidden = after
        return hidden, blends

    def _states(
        self,
        steps: Sequence[LinkedStep],
        hidden: Tensor,
        values: Sequence[Tensor],
        slots: Sequence[tuple[Tensor, Tensor]],
        blends: Blends[Tensor],
    ) -> Iterator[Tensor]:
        """The hidden state after each step."""
        for step, slot in zip(steps, slots, strict=True):
            if step.opens:
                blends.open(hidden, step.opens)
            hidden = step.region(step.operands(hidden, values, slot))[0]
            if step.closes:
                hidden = blends.close(hidden, step.closes)
            yield hidden

    def _head(self, hidden: Tensor, values: Sequence[Tensor]) -> Tensor:
        head = self.epilogue
        assert head is not None
        return head.region(head.operands(hidden, values))[0]


class Linker:
    """Links programs out of regions; `regions` makes those that are missing."""

    def __init__(self, library: LayerLibrary, regions: RegionTable, pool: KvPool) -> None:
        self.library, self.regions, self.pool = library, regions, pool
        self._linked: dict[tuple[Program, ShapeClass | None, bool], LinkedProgram] = {}
        self._lock = threading.RLock()

    @property
    def programs(self) -> set[Program]:
        """Those that are linked now, for whatever shapes."""
        return {program for program, *_ in list(self._linked)}

    def link(self, program: Program, shape: ShapeClass, every: bool = True) -> LinkedProgram:
        """The program on the regions of `shape`, for the logits of every token or of one token per
        row.
        """
        key = (program, shape if self.regions.backend.needs_shapes else None, every)
        if (linked := self._linked.get(key)) is not None:
            return linked
        with self._lock:
            if (linked := self._linked.get(key)) is not None:  # another thread was first
                return linked
            linked = self._link(program, shape, every)
            # a search runs millions of programs; linking one again costs little
            if len(self._linked) >= _MAX_LINKED:
                del self._linked[next(iter(self._linked))]
            self._linked[key] = linked
            return linked

    def calls(self, program: Program, shape: ShapeClass, every: bool = True) -> list[Wanted]:
        """The regions that one run of the program linked so calls, in order; of a prompt in chunks,
        the last one's.
        """
        start, head = self.library.prologue.target, self.library.epilogue.target
        targets = [self.library.layers[layer].target for layer in program.path]
        if every:
            return [(name, shape) for name in (start, *targets, head)]
        many = [(name, shape) for name in (start, *targets[:-1], targets[-1] + KV_WRITES)]
        return many + [(name, shape.decode) for name in (start, targets[-1], head)]

    def _link(self, program: Program, shape: ShapeClass, every: bool) -> LinkedProgram:
        library = self.library
        start, head = library.prologue, library.epilogue
        wanted = self.calls(program, shape, every)
        # what decoding needs is needed as well: asked for together, it is compiled together
        made = self.regions.get(wanted if every else wanted + self.calls(program, shape.decode))
        regions = {name: region for (name, of), region in made.items() if of == shape}
        steps = []
        for step in program.schedule():
            call = library.layers[step.layer]
            steps.append(
                LinkedStep(
                    regions.get(call.target, _unlinked),
                    call.sides,
                    call.weights,
                    step.opens,
                    step.closes,
                )
            )
        return LinkedProgram(
            program,
            regions[start.target],
            start.weights,
            tuple(steps),
            LinkedStep(regions[head.target], head.sides, head.weights, 0, ()) if every else None,
            self.pool.kv_index,
            None if every else regions[library.layers[program.path[-1]].target + KV_WRITES],
            None if every else self.link(program, shape.decode),
        )


def _unlinked(operands: list[Tensor]) -> Sequence[Tensor]:
    raise AssertionError("the last step of a prefill runs for its last token alone")
