"""The linker: regions + a program -> a straight sequence of calls on shared weights.

A region is compiled once per body and shape class; linking a further program only looks regions up, so it costs
well under a millisecond and compiles nothing.

Shape legend: B batch, T tokens, d hidden size, V vocabulary.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends.base import Backend, Region, RegionRecord, ShapeClass
from .kv_cache import KvPool
from .library import Call, LayerLibrary
from .program import Program

log = logging.getLogger("polar_fx.link")

_MAX_LINKED = 1024

# Example sizes for a dynamic axis: primes, so that no axis is taken for a model dimension of the same size.
_EXAMPLE = {"batch": 3, "tokens": 127}


@dataclass(frozen=True, slots=True)
class LinkedStep:
    """One executed layer: its code, its operands, and the blends that open before and close after it."""

    region: Region
    sides: tuple[int, ...]
    weights: tuple[Tensor, ...]
    opens: int
    closes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LinkedProgram:
    """A program bound to the regions of one shape class."""

    program: Program
    prologue: Region
    prologue_weights: tuple[Tensor, ...]
    steps: tuple[LinkedStep, ...]
    kv_index: Tensor

    def run(self, input_ids: Tensor, positions: Tensor, slots: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Hidden state [B, T, d] after the last step, and the side values; writes the slots in place."""
        inputs = [input_ids, positions, self.kv_index]
        values = [*inputs, *self.prologue(*inputs, *self.prologue_weights)]
        hidden = values[len(inputs)]  # the prologue hands it on first
        saved: list[Tensor] = []
        for step, (key, value) in zip(self.steps, slots, strict=True):
            saved += [hidden] * step.opens
            hidden = step.region(hidden, *[values[i] for i in step.sides], key, value, *step.weights)
            for damping in step.closes:
                hidden = torch.lerp(saved.pop(), hidden, damping)
        return hidden, values


class Linker:
    """Compiles regions on demand and links programs out of them."""

    def __init__(self, library: LayerLibrary, backend: Backend, pool: KvPool) -> None:
        self.library, self.backend, self.pool = library, backend, pool
        self.records: list[RegionRecord] = []
        self._regions: dict[tuple[str, ShapeClass | None], Region] = {}
        self._linked: dict[tuple[Program, ShapeClass | None], LinkedProgram] = {}
        self._lock = threading.RLock()
        rows, tokens = library.captured.graph_module.graph.find_nodes(op="placeholder")[0].meta["val"].shape
        self._axes = {str(rows): "batch", str(tokens): "tokens"}

    def link(self, program: Program, shape: ShapeClass) -> LinkedProgram:
        """The program on the regions of `shape`, compiling those that are missing."""
        key = (program, shape if self.backend.needs_shapes else None)
        if (linked := self._linked.get(key)) is not None:
            return linked
        with self._lock:
            regions = self._regions_of(program, shape)
            steps = []
            for step in program.schedule():
                call = self.library.layers[step.layer]
                steps.append(LinkedStep(regions[call.target], call.sides, call.weights, step.opens, step.closes))
            start = self.library.prologue
            linked = LinkedProgram(program, regions[start.target], start.weights, tuple(steps), self.pool.kv_index)
            if len(self._linked) >= _MAX_LINKED:  # a search runs millions of programs; linking one again costs little
                del self._linked[next(iter(self._linked))]
            self._linked[key] = linked
            return linked

    def epilogue(self, shape: ShapeClass, hidden: Tensor, sides: Sequence[Tensor]) -> Region:
        """The head's region for hidden states of that shape class."""
        key = (self.library.epilogue.target, shape if self.backend.needs_shapes else None)
        if (region := self._regions.get(key)) is None:
            with self._lock:
                # sizes that differ from one another and from the model's, so that no axis is taken for another
                rows, tokens = shape.batch or _EXAMPLE["batch"], shape.tokens or _EXAMPLE["tokens"]
                example = hidden if sides else hidden.new_zeros(rows, tokens, hidden.shape[-1])
                region = self._region(self.library.epilogue, shape, [example, *sides, *self.library.epilogue.weights])
        return region

    def _regions_of(self, program: Program, shape: ShapeClass) -> dict[str, Region]:
        """Regions by body name for every body the program needs."""
        library = self.library
        wanted = {library.layers[layer].target: layer for layer in reversed(program.path)}
        names = [library.prologue.target, *wanted]
        found = {n: self._regions.get((n, shape if self.backend.needs_shapes else None)) for n in names}
        if all(found.values()):
            return found  # type: ignore[return-value]
        batch, tokens = shape.batch or _EXAMPLE["batch"], shape.tokens or _EXAMPLE["tokens"]
        tokens = min(tokens, self.pool.max_length)
        device = self.pool.device
        positions = torch.arange(tokens, device=device).expand(batch, tokens).contiguous()
        inputs = [torch.zeros_like(positions), positions, self.pool.kv_index]
        start = library.prologue
        region = self._region(start, shape, [*inputs, *start.weights])
        regions = {start.target: region}
        with torch.no_grad():
            values = [*inputs, *region(*inputs, *start.weights)]
        for target, layer in wanted.items():
            call = library.layers[layer]
            with self.pool.session([library.captured.kv_specs[layer]], batch) as session:
                session.will_write(self.pool.length)  # compiling may run the example
                example = [values[len(inputs)], *(values[i] for i in call.sides), *session.slots[0], *call.weights]
                regions[target] = self._region(call, shape, example)
        return regions

    def _region(self, call: Call, shape: ShapeClass, example: list[Tensor]) -> Region:
        key = (call.target, shape if self.backend.needs_shapes else None)
        if (region := self._regions.get(key)) is not None:
            return region
        start = time.perf_counter()
        body = self.library.bodies[call.target]
        dynamic = []
        for node in body.graph.find_nodes(op="placeholder"):
            axes = {i: self._axes.get(str(s)) for i, s in enumerate(node.meta["val"].shape)}
            dynamic.append({i: a for i, a in axes.items() if a and getattr(shape, a) is None})
        region = self.backend.compile_region(body, example, dynamic)
        self._regions[key] = region
        if self.backend.needs_shapes:
            record = RegionRecord(call.target, str(shape), time.perf_counter() - start)
            self.records.append(record)
            log.info("compiled %s for %s in %.1f s", record.body, record.shapes, record.seconds)
        return region
