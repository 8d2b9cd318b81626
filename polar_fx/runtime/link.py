"""The linker: regions + a program -> a straight sequence of calls on shared weights.

A region is compiled once per body and shape class; linking a further program only looks regions up,
so it costs well under a millisecond and compiles nothing.

Shape legend: B batch, T tokens, d hidden size, V vocabulary.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import Region, ShapeClass
from ..library import LayerLibrary
from ..program import Program
from .kv_cache import KvPool
from .regions import KV_WRITES, RegionTable, Wanted

_MAX_LINKED = 1024


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
        self, hidden: Tensor, values: Sequence[Tensor], slot: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        return [hidden, *[values[i] for i in self.sides], *slot, *self.weights]


@dataclass(frozen=True, slots=True)
class LinkedProgram:
    """A program bound to the regions of one shape class.

    For several tokens a row, `last` is the same program for one token, and `write_kv` the last
    step's KV writes.
    """

    program: Program
    prologue: Region
    prologue_weights: tuple[Tensor, ...]
    steps: tuple[LinkedStep, ...]
    epilogue: LinkedStep | None
    kv_index: Tensor
    write_kv: Region | None = None
    last: "LinkedProgram | None" = None

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Sequence[tuple[Tensor, Tensor]],
        done: int = 0,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of every token; writes the slots in place.

        `done` and `hidden` as in `run_last`.
        """
        values = self._start(input_ids, positions)
        before = values[3] if hidden is None else hidden
        hidden, _ = self._steps(self.steps[done:], values, before, slots[done:], [])
        return self._head(hidden, values)

    def run_first(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Sequence[tuple[Tensor, Tensor]],
        num_steps: int,
    ) -> Tensor:
        """Hidden states [B, T, d] after the first steps, 0 .. the number of steps - 1; writes their
        slots in place.
        """
        values = self._start(input_ids, positions)
        return self._steps(self.steps[:num_steps], values, values[3], slots, [])[0]

    def run_last(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Sequence[tuple[Tensor, Tensor]],
        where: Tensor | None,
        done: int = 0,
        hidden: Tensor | None = None,
    ) -> Tensor | None:
        """Logits [B, 1, V] of one token per row, `where` i64[B]; or only the KV writes, if that is
        None.

        What comes after the last step's keys and values runs for those tokens alone, as if they
        were decoded. The first `done` steps, of `run_first`, left `hidden` [B, T, d] and are not
        run again; none of them may open a blend.
        """
        assert self.write_kv is not None and self.last is not None
        values = self._start(input_ids, positions)
        before = values[3] if hidden is None else hidden
        hidden, saved = self._steps(self.steps[done:-1], values, before, slots[done:], [])
        step = self.steps[-1]
        self.write_kv(step.operands(hidden, values, slots[-1]))
        if where is None:
            return None
        rows = torch.arange(len(where), device=where.device)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[rows, where][:, None]

        saved += [hidden] * step.opens
        last = self.last
        values = last._start(pick(input_ids), pick(positions))
        hidden = last.steps[-1].region(last.steps[-1].operands(pick(hidden), values, slots[-1]))[0]
        saved = [pick(s) for s in saved]
        for damping in step.closes:
            hidden = torch.lerp(saved.pop(), hidden, damping)
        return last._head(hidden, values)

    def _start(self, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """The side values; the first behind the three inputs is the hidden state."""
        inputs = [input_ids, positions, self.kv_index]
        return [*inputs, *self.prologue([*inputs, *self.prologue_weights])]

    def _steps(
        self,
        steps: Sequence[LinkedStep],
        values: Sequence[Tensor],
        hidden: Tensor,
        slots: Sequence[tuple[Tensor, Tensor]],
        saved: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        for step, slot in zip(steps, slots, strict=False):
            if step.opens:
                saved += [hidden] * step.opens
            hidden = step.region(step.operands(hidden, values, slot))[0]
            for damping in step.closes:
                hidden = torch.lerp(saved.pop(), hidden, damping)
        return hidden, saved

    def _head(self, hidden: Tensor, values: Sequence[Tensor]) -> Tensor:
        head = self.epilogue
        assert head is not None
        return head.region([hidden, *[values[i] for i in head.sides], *head.weights])[0]


class Linker:
    """Links programs out of regions; `regions` makes those that are missing."""

    def __init__(self, library: LayerLibrary, regions: RegionTable, pool: KvPool) -> None:
        self.library, self.regions, self.pool = library, regions, pool
        self._linked: dict[tuple[Program, ShapeClass | None, bool], LinkedProgram] = {}
        self._lock = threading.RLock()

    @property
    def num_programs(self) -> int:
        """Programs that are linked now, for whatever shapes."""
        return len({program for program, *_ in list(self._linked)})

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
