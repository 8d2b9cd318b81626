"""The linker: regions + a program -> a straight sequence of calls on shared weights.

A region is compiled once per body and shape class; linking a further program only looks regions up,
so it costs well under a millisecond and compiles nothing.

Shape legend: B batch, T tokens, d hidden size, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import RegionName, ShapeClass
from ..errors import ProgramError
from ..library import LayerLibrary
from ..library.steps import Chain
from ..library.symbols import SymbolTable
from ..program import Program
from .kv_cache import KvPool, KvSession, Resume, require_program
from .regions import RegionTable

_MAX_LINKED = 1024


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What one pass over a linked program takes: `ids` and `positions` i64[B, T], and a slot of
    each step, in a session of `program`.

    `logits_at` i64[B] names the token of each row whose logits are wanted, for a program that is
    linked for one token per row. After a `resume` only the steps after it run.
    """

    program: Program
    ids: Tensor
    positions: Tensor
    slots: Sequence[tuple[Tensor, ...]]
    logits_at: Tensor | None = None
    resume: Resume | None = None

    @classmethod
    def of(
        cls,
        session: KvSession,
        ids: Tensor,
        *,
        positions: Tensor,
        logits_at: Tensor | None = None,
        resume: Resume | None = None,
    ) -> "StepInputs":
        """Those of a pass in a session."""
        return cls(session.program, ids, positions, session.slots, logits_at, resume)


@dataclass(frozen=True, slots=True)
class LinkedProgram:
    """A program bound to the regions of one shape class, as a `Chain` of calls on tensors."""

    program: Program
    chain: Chain[Tensor]
    kv_index: Tensor

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits [B, T, V] of every token, or [B, 1, V] of the tokens `logits_at`; writes the slots
        in place.

        Raises ProgramError for the inputs of another program.
        """
        self.check(inputs)
        pick = None if inputs.logits_at is None else tokens_at(inputs.logits_at)
        return self.chain.run(
            self._graph_inputs(inputs), inputs.slots, pick=pick, resume=_begun(inputs)
        )

    def write_kv(self, inputs: StepInputs) -> None:
        """Write every step's keys and values, and compute nothing that only logits need.

        Of a program linked for one token per row. Raises ProgramError as `run` does.
        """
        self.check(inputs)
        self.chain.write_kv(self._graph_inputs(inputs), inputs.slots, resume=_begun(inputs))

    def states(self, inputs: StepInputs) -> Iterator[Tensor]:
        """The hidden states [B, T, d] before the first step, and then after each; a step runs when
        the state after it is asked for, and needs its slot only then.

        Of a program linked for one token per row, all but those that run for that alone. Raises
        ProgramError as `run` does.
        """
        require_program(inputs.program, self.program)
        return self.chain.states(self.chain.start(self._graph_inputs(inputs)), inputs.slots)

    def check(self, inputs: StepInputs) -> None:
        """Raise ProgramError unless the inputs are of a session of this program, with a slot a
        step: steps would be left out.
        """
        require_program(inputs.program, self.program)
        if len(inputs.slots) != len(self.chain.steps):
            raise ProgramError(
                f"program {self.program} has {len(self.chain.steps)} steps but its session "
                f"{len(inputs.slots)} slots; open a session with all of them"
            )

    def _graph_inputs(self, inputs: StepInputs) -> list[Tensor]:
        return [inputs.ids, inputs.positions, self.kv_index]


def tokens_at(where: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes token where[b] of each row out of a value [B, T, ...]: [B, 1, ...]."""
    rows = torch.arange(len(where), device=where.device)
    return lambda value: value[rows, where][:, None]


def _begun(inputs: StepInputs) -> tuple[int, Tensor] | None:
    return inputs.resume and (inputs.resume.num_steps, inputs.resume.hidden)


def region_calls(
    table: SymbolTable, program: Program, *, shape: ShapeClass, every: bool
) -> list[RegionName]:
    """The regions that one run of a program calls, in order, for the logits of every token or of
    one token a row; of a prompt in chunks, those of the last one.
    """
    start, head = table.prologue.target, table.epilogue.target
    steps = [table.layers[layer].target for layer in program.path]
    if every:
        return [RegionName(body, shape) for body in (start, *steps, head)]
    num_last, cut = table.ending(program.path)
    most, last = steps[: len(steps) - num_last], steps[len(steps) - num_last :]
    many = [RegionName(body, shape) for body in (start, *most)]
    writes = [RegionName(last[0], shape, kv_writes=True)] if cut else []
    return [*many, *writes, *(RegionName(body, shape.decode) for body in (start, *last, head))]


class Linker:
    """Links programs out of regions; `regions` makes those that are missing."""

    def __init__(self, library: LayerLibrary, regions: RegionTable, *, pool: KvPool) -> None:
        self.library, self.regions, self.pool = library, regions, pool
        self._linked: dict[tuple[Program, ShapeClass | None, bool], LinkedProgram] = {}
        self._lock = threading.RLock()

    @property
    def programs(self) -> set[Program]:
        """Those that are linked now, for whatever shapes."""
        return {program for program, *_ in list(self._linked)}

    def link(self, program: Program, shape: ShapeClass, *, every: bool = True) -> LinkedProgram:
        """The program on the regions of `shape`, for the logits of every token or of one token per
        row.
        """
        key = (program, shape if self.regions.backend.needs_shapes else None, every)
        if (linked := self._linked.get(key)) is not None:
            return linked
        with self._lock:
            if (linked := self._linked.get(key)) is not None:  # another thread was first
                return linked
            linked = self._link(program, shape, every=every)
            # a search runs millions of programs; linking one again costs little
            if len(self._linked) >= _MAX_LINKED:
                del self._linked[next(iter(self._linked))]
            self._linked[key] = linked
            return linked

    def calls(self, program: Program, shape: ShapeClass, *, every: bool = True) -> list[RegionName]:
        """The regions that one run of the program linked so calls, in order."""
        return region_calls(self.library.table, program, shape=shape, every=every)

    def _link(self, program: Program, shape: ShapeClass, *, every: bool) -> LinkedProgram:
        library = self.library
        start, head = library.prologue, library.epilogue
        wanted = self.calls(program, shape, every=every)
        # what decoding needs is needed as well: asked for together, it is compiled together
        made = self.regions.get(wanted if every else wanted + self.calls(program, shape.decode))
        steps = []
        for step in program.schedule():
            call = library.layers[step.layer]
            code = made.get(RegionName(call.target, shape), _unlinked)
            steps.append(call.step(code, step.opens, closes=step.closes))
        num_last, cut = (0, False) if every else library.table.ending(program.path)
        first = library.layers[program.path[-num_last]].target
        chain = Chain(
            made[RegionName(start.target, shape)],
            start.weights,
            tuple(steps),
            head.step(made[RegionName(head.target, shape)]) if every else None,
            torch.lerp,
            made[RegionName(first, shape, kv_writes=True)] if cut else None,
            None if every else self.link(program, shape.decode).chain,
            num_last,
            library.table.slot_steps(program) if library.table.owners else None,
        )
        return LinkedProgram(program, chain, self.pool.kv_index)


def _unlinked(operands: list[Tensor]) -> Sequence[Tensor]:
    raise AssertionError("the last steps of a prefill run for its last token alone")
