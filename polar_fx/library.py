"""The layer library: distinct layer graphs, the weights they are called with, and the plain interpreter.

A transformer's layers are object files and a program is a link order. `LayerLibrary` holds the object files
(one graph per kind of layer, prologue and epilogue) and the symbol table (which weights and side values each
layer's call takes). Everything that runs programs reads this table; `interpret` is the oracle they are tested
against: it runs the step graph that the passes build, node by node, and knows nothing of linking.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .capture import CapturedModel, KvSpec
from .errors import ProgramError
from .passes.base import body, kind, layer_calls, role
from .passes.pipeline import Pipeline, PipelineResult, flat_pipeline, library_pipeline, program_pipeline
from .passes.text import graph_fingerprint
from .program import Program


@dataclass(frozen=True)
class Call:
    """One entry of the symbol table: the body's name and the operands a call passes beside hidden state and KV.

    `sides` index the list of side values (graph inputs, then prologue results); `weights` are the model's own
    tensors.
    """

    target: str
    sides: tuple[int, ...]
    weights: tuple[Tensor, ...]


class LayerLibrary:
    """A captured model as callable pieces."""

    def __init__(self, captured: CapturedModel, pipeline: Pipeline | None = None) -> None:
        self.captured = captured
        self.pipeline = pipeline or library_pipeline()
        result: PipelineResult = self.pipeline.run(captured.graph_module)
        self.records = result.records
        self.graph_module = result.graph_module
        calls = layer_calls(self.graph_module)
        if len(calls) != captured.depth:
            raise ProgramError(
                f"the pipeline {self.pipeline} left {len(calls)} layer calls of {captured.depth}; keep outline-layers in it"
            )
        ends = {kind(n): n for n in self.graph_module.graph.nodes if kind(n) in ("prologue", "epilogue")}
        self._inputs = [n for n in self.graph_module.graph.nodes if n.op == "placeholder" and role(n) == "input"]
        self._results = self._prologue_results(ends["prologue"])
        self.prologue = self._call(ends["prologue"])
        self.layers = tuple(self._call(c) for c in calls)
        self.epilogue = self._call(ends["epilogue"])
        self._program_graph = functools.lru_cache(maxsize=64)(self._build_program_graph)

    @property
    def depth(self) -> int:
        return self.captured.depth

    @property
    def bodies(self) -> dict[str, GraphModule]:
        """Graphs by name: `prologue`, `layer_kind_0` ..., `epilogue`."""
        calls = (self.prologue, *self.layers, self.epilogue)
        names = dict.fromkeys(c.target for c in calls)
        return {n: self.graph_module.get_submodule(n) for n in names}  # type: ignore[misc]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies graphs and wiring, not weights."""
        return graph_fingerprint(self.graph_module)

    def kv_specs(self, program: Program) -> list[KvSpec]:
        """Slot geometry of each step."""
        return [self.captured.kv_specs[layer] for layer in program.path]

    def check(self, program: Program) -> None:
        """Raise ProgramError if the program is of another depth."""
        if program.depth != self.depth:
            raise ProgramError(
                f"program {program} has depth {program.depth} but the model has {self.depth} layers; write it for /{self.depth}"
            )

    def program_graph(self, program: Program) -> GraphModule:
        """Step graph of a program (cached): prologue, one call per step with its own KV slot, epilogue."""
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
        self, program: Program, input_ids: Tensor, positions: Tensor, kv_index: Tensor, slots: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Logits [B, T, V] of the step graph, run operator by operator; writes the slots in place."""
        return self.program_graph(program)(input_ids, positions, kv_index, *(t for pair in slots for t in pair))

    # ---- reading the symbol table off the graph

    def _prologue_results(self, prologue: Node) -> dict[Node, int]:
        users = [u for u in prologue.users if u.op == "call_function"]
        return {u: len(self._inputs) + int(u.args[1]) for u in users}  # type: ignore[arg-type]

    def _call(self, call: Node) -> Call:
        places: dict[Node, int] = {**{n: i for i, n in enumerate(self._inputs)}, **self._results}
        roles = [role(n) for n in body(self.graph_module, call).graph.nodes if n.op == "placeholder"]
        sides: list[int] = []
        weights: list[Tensor] = []
        for operand_role, argument in zip(roles, call.args, strict=True):
            assert isinstance(argument, Node)
            if operand_role in ("side", "input"):
                sides.append(places[argument])
            elif operand_role == "weight":
                weights.append(self._attribute(str(argument.target)))
        return Call(str(call.target), tuple(sides), tuple(weights))

    def _attribute(self, target: str) -> Tensor:
        value: Any = self.graph_module
        for part in target.split("."):
            value = getattr(value, part)
        return value.detach()
