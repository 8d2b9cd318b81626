"""The layer library: distinct layer graphs, the weights they are called with, and the plain
interpreter.

A transformer's layers are object files and a program is a link order. `LayerLibrary` holds the
object files (one graph per kind of layer, prologue and epilogue) and the symbol table (which
weights and side values each layer's call takes). Everything that runs programs reads this table;
`interpret` is the oracle they are tested
against: it runs the step graph that the passes build, node by node, and knows nothing of linking.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..capture import CapturedModel, KvSpec
from ..errors import CaptureError, InputError, ProgramError
from ..passes.base import PassError, kind, layer_calls
from ..passes.pipeline import (
    PassRecord,
    Pipeline,
    PipelineResult,
    flat_pipeline,
    library_pipeline,
    program_pipeline,
)
from ..program import Program
from .steps import Code, Step
from .symbols import Symbol, SymbolTable, read_symbols


@dataclass(frozen=True)
class Call:
    """A symbol bound to the model's own tensors."""

    target: str
    sides: tuple[int, ...]
    weights: tuple[Tensor, ...]

    def step(
        self, code: Code[Tensor], opens: int = 0, *, closes: tuple[float, ...] = ()
    ) -> Step[Tensor]:
        """The call with the code of its body, and the blends around it."""
        return Step(code, self.sides, self.weights, opens, closes)


class LayerLibrary:
    """A captured model as callable pieces. The graphs are made when first asked for, if only the
    table is known yet.

    `table` is the symbol table, `tensors` the model's own weights by name.
    """

    def __init__(self, captured: CapturedModel, pipeline: Pipeline | None = None) -> None:
        self.pipeline = pipeline or library_pipeline()
        self._capture: Callable[[], CapturedModel] = lambda: captured
        self._prepare(read_symbols(self.graph_module, captured.kv_specs))

    @classmethod
    def from_table(
        cls,
        table: SymbolTable,
        tensors: Mapping[str, Tensor],
        *,
        capture: Callable[[], CapturedModel],
        pipeline: Pipeline | None = None,
    ) -> "LayerLibrary":
        """A library known by its table; `capture` traces the model should its graphs be needed
        after all.
        """
        self = cls.__new__(cls)
        self.pipeline = pipeline or library_pipeline()
        self._capture = capture
        self._prepare(table, tensors)
        return self

    def _prepare(self, table: SymbolTable, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.table = table

        names = dict.fromkeys(n for symbol in table.calls() for n in symbol.weights)
        self.tensors = {
            n: (tensors[n] if tensors is not None else self._attribute(n)).detach() for n in names
        }

        def bind(symbol: Symbol) -> Call:
            return Call(symbol.target, symbol.sides, tuple(self.tensors[n] for n in symbol.weights))

        self.prologue, self.epilogue = bind(table.prologue), bind(table.epilogue)
        self.layers = tuple(bind(s) for s in table.layers)
        self._program_graph = functools.lru_cache(maxsize=64)(self._build_program_graph)

    # ----------------------------------------------------------------------------------- the graphs

    @functools.cached_property
    def captured(self) -> CapturedModel:
        """The flat graph and what is known of it; traces the model if that has not happened in this
        process.
        """
        return self._capture()

    @functools.cached_property
    def _pipeline_result(self) -> PipelineResult:
        try:
            result = self.pipeline.run(self.captured.graph_module)
        except PassError as error:
            raise CaptureError(
                f"the captured graph cannot be taken apart into layers: {error}"
            ) from error
        calls = layer_calls(result.graph_module)
        ends = {kind(n) for n in result.graph_module.graph.nodes}
        if len(calls) != self.captured.depth or not {"prologue", "epilogue"} <= ends:
            if "outline-layers" in str(self.pipeline):
                raise CaptureError(
                    f"of the {self.captured.depth} layers in {self.captured.layer_path}, the "
                    f"trace tells {len(calls)} apart: either they share submodules, or they are "
                    "not the layers that the forward pass runs; pass a model whose layers each "
                    "have modules of their own, and of a model with several parts its language "
                    "model alone"
                )
            raise ProgramError(
                f"the pipeline {self.pipeline} left {len(calls)} layer calls of "
                f"{self.captured.depth}; keep outline-layers in it"
            )
        table = read_symbols(result.graph_module, self.captured.kv_specs)
        if hasattr(self, "table") and table != self.table:
            raise CaptureError(
                "the model's graph is not the one its cached symbol table was made from "
                f"({_first_difference(self.table, table)}); run `python -m polar_fx cache clear` "
                "and report this model"
            )
        return result

    @property
    def records(self) -> tuple[PassRecord, ...]:
        """What each pass of the pipeline did."""
        return self._pipeline_result.records

    @property
    def graph_module(self) -> GraphModule:
        """The outlined graph: prologue, one call per layer, epilogue."""
        return self._pipeline_result.graph_module

    @property
    def is_traced(self) -> bool:
        """Whether the graphs exist in this process."""
        return "captured" in self.__dict__

    @property
    def bodies(self) -> dict[str, GraphModule]:
        """Graphs by name: `prologue`, `layer_kind_0` ..., `epilogue`."""
        return {n: self.graph_module.get_submodule(n) for n in self.table.bodies}  # type: ignore[misc]

    # ------------------------------------------------------------------------------------ the table

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in self.tensors.values() if t.is_floating_point())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies graphs and wiring (sha256), not weights."""
        return hashlib.sha256(self.table.to_json().encode()).hexdigest()

    @functools.cached_property
    def model_fingerprint(self) -> str:
        """Identifies graphs, wiring and weights (sha256); reads every weight once."""
        found = hashlib.sha256(self.fingerprint.encode())
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()

    @functools.cached_property
    def weights_fingerprint(self) -> str:
        """Identifies the weights of two axes and more, whatever they are called (sha256): the same
        for captures of one model by other versions of torch or transformers.
        """
        found = []
        for tensor in self.tensors.values():
            if tensor.dim() >= 2:
                each = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                each.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
                found.append(each.hexdigest())
        return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()

    def kv_specs(self, program: Program) -> list[KvSpec]:
        """Slot geometry of each step; a step that only reads the slot of another has none."""
        return [self.table.kv_specs[layer] for layer in program.path]

    def require_no_states(self, what: str) -> None:
        """Raise InputError for a model whose layers keep states, which `what` does not hold."""
        for layer, spec in enumerate(self.table.kv_specs):
            if spec.states:
                raise InputError(
                    f"layer {layer} keeps a recurrent or convolutional state, which {what} does "
                    "not hold yet; run this model by polar_fx.compile, on the CPU or with "
                    "backend='eager'"
                )

    def require_own_kv(self, what: str) -> None:
        """Raise InputError for a model whose layers read the keys and values of others, which
        `what` does not hold.
        """
        for reader, owner in self.table.owners.items():
            raise InputError(
                f"layer {reader} reads the keys and values of layer {owner}, which {what} does not "
                "hold yet; run this model by polar_fx.compile with tier='linked'"
            )

    def check(self, program: Program) -> None:
        """Raise ProgramError if the program is of another depth, or skips a layer whose keys and
        values a later one reads.
        """
        if program.depth != self.depth:
            raise ProgramError(
                f"program {program} has depth {program.depth} but the model has {self.depth} "
                f"layers; write it for /{self.depth}"
            )
        if self.table.owners:
            self.table.slot_steps(program)

    def runs(self, program: Program) -> bool:
        """Whether `check` lets the program through."""
        try:
            self.check(program)
        except ProgramError:
            return False
        return True

    # --------------------------------------------------------------------------- graphs of programs

    def program_graph(self, program: Program) -> GraphModule:
        """Step graph of a program (cached): prologue, one call per step with its own KV slot,
        epilogue.
        """
        self.check(program)
        return self._program_graph(program)

    def _build_program_graph(self, program: Program) -> GraphModule:
        blends = tuple((b.start, b.stop, b.damping) for b in program.blends)
        return program_pipeline(program.path, blends).run(self.graph_module).graph_module

    def flat_graph(self, program: Program) -> GraphModule:
        """One graph of operators for the whole program."""
        return flat_pipeline().run(self.program_graph(program)).graph_module

    @torch.no_grad()
    def interpret(
        self,
        program: Program,
        input_ids: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        slots: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        """Logits [B, T, V] of the step graph, run operator by operator; writes the slots in
        place.
        """
        return self.program_graph(program)(
            input_ids, positions, kv_index, *(t for pair in slots for t in pair)
        )

    def _attribute(self, target: str) -> Tensor:
        value = self.graph_module
        for part in target.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value


def _first_difference(known: SymbolTable, made: SymbolTable) -> str:
    """Where two tables, which are not equal, differ first, in words."""
    lines = zip_longest(known.to_json().splitlines(), made.to_json().splitlines(), fillvalue="")
    for number, (before, now) in enumerate(lines, 1):
        if before != now:
            return f"line {number} was {before.strip()!r:.120} and is {now.strip()!r:.120}"
    return "the same as text"
