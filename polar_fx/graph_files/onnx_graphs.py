"""Programs as ONNX graphs: torch exports each body once, as a function, and a program is a graph of
calls of them.

That is linking once more. Functions take weights and KV slots as operands, so a program's graph is
some kilobytes, made in milliseconds, and no weight is in it: graphs name places in one file of
weights.

Shape legend: B batch, T tokens, L KV length, W tokens of a row whose logits are asked for, V
vocabulary, H KV heads, E head size.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnx_ir.tensor_adapters import from_torch_dtype
from onnxscript import opset23
from torch import Tensor, nn
from torch.fx import GraphModule

from ..backends.specialize import specialize
from ..bundle.contents import DTYPES
from ..bundle.files import parse_json
from ..errors import CaptureError
from ..library import LayerLibrary
from ..library.steps import Chain, Step
from ..library.symbols import KvSpec, Symbol
from ..passes.base import Caller, copy_graph_module
from ..program import Program
from .program_file import SIZES

OPSET = opset23.version  # the first with attention, rotary embedding and RMS norm as operators
_IR_VERSION = 10
_DOMAIN = "polar_fx"  # of the functions
aten = torch.ops.aten


# ------------------------------------------------------------------------------ bodies as functions


def export_functions(library: LayerLibrary) -> dict[str, ir.Function]:
    """Each body as a function of its operands, for any B, T and L; slots are written to copies,
    which are results.

    Raises CaptureError if torch cannot export one.
    """
    if library.table.epilogue.sides:
        raise CaptureError(
            "the model's head takes more than hidden states, which ONNX files are not written "
            "for; report it"
        )
    return {name: _export(library, name) for name in library.table.bodies}


class _Functional(nn.Module):
    """A body that also returns the slots it wrote, behind its results."""

    def __init__(self, body: nn.Module, slots: Sequence[int]) -> None:
        super().__init__()
        self.body, self.slots = body, slots

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        results = self.body(*operands)
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *(operands[i] for i in self.slots))


def _export(library: LayerLibrary, name: str) -> ir.Function:
    operands = library.table.bodies[name].operands
    body = _Functional(
        _writing_by_head(library.bodies[name]),
        [i for i, o in enumerate(operands) if o.role == "kv"],
    )
    example = [o.example(SIZES, library.device) for o in operands]
    dynamic = [o.axes() for o in operands]
    try:
        with _quiet():
            exported = torch.onnx.export(
                specialize(body, example, dynamic=dynamic),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table={
                    torch.ops.transformers.grouped_mm_fallback.default: _grouped_matmul
                },
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch's own message is advice to its developers
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0]
        raise CaptureError(
            f"torch cannot export {name} to ONNX: {type(cause).__name__}: {reason}"
        ) from error
    assert exported is not None
    # every operator's place in files of this machine
    ClearMetadataAndDocStringPass()(exported.model)
    graph = exported.model.graph
    for i, (value, operand) in enumerate(zip(graph.inputs, operands, strict=True)):
        value.name = f"{operand.role}_{i}"
    for value in list(graph.initializers.values()):  # functions have none
        constant = ir.node("Constant", [], {"value": value.const_value})  # type: ignore[dict-item]
        graph.insert_before(graph[0], constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0], replace_graph_outputs=True)
    graph.initializers.clear()
    return ir.Function(_DOMAIN, name, graph=graph, attributes=[])


def _writing_by_head(body: GraphModule) -> GraphModule:
    """The body with KV writes that index all of [B, H, L].

    Those that index [B, L] become a transpose of the whole slot before and after the write.
    """
    graph_module, graph = copy_graph_module(body)
    for node in graph.find_nodes(op="call_function", target=aten.index_put_.default):
        slot, indices, values, *rest = node.args
        if len(indices) != 3 or indices[1] is not None:
            continue
        with graph.inserting_before(node):
            call = Caller(graph, node)
            rows, positions = (
                call(aten.unsqueeze.default, indices[0], 2),
                call(aten.unsqueeze.default, indices[2], 1),
            )
            heads = call(
                aten.unsqueeze.default, call(aten.arange.default, slot.meta["val"].shape[1]), 1
            )
            node.args = (
                slot,
                [rows, heads, positions],
                call(aten.transpose.int, values, 1, 2),
                *rest,
            )
    graph_module.recompile()
    return graph_module


def _grouped_matmul(rows: Any, weight: Any, offs: Any) -> Any:
    """[S, N] of rows [S, K] sorted by expert, weights [experts, K, N], and where each expert's rows
    end, integers [experts].

    One product for each expert, of as many rows as it has.
    """
    opset: Any = opset23  # whose annotations are those of values in a script
    ends = opset.Cast(offs, to=ir.DataType.INT64)
    start, products = opset.Constant(value_ints=[0]), []
    for expert in range(weight.shape[0]):
        end = opset.Gather(ends, opset.Constant(value_ints=[expert]))
        products.append(
            opset.MatMul(
                opset.Slice(rows, start, end),
                opset.Gather(weight, opset.Constant(value_int=expert)),
            )
        )
        start = end
    return opset.Concat(*products, axis=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnx warn of and log about their own internals."""
    levels = {
        log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnx_ir", "onnxscript"))
    }
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


# ------------------------------------------------------------------------------- programs as graphs


def external_weights(path: Path, ties: Mapping[str, str]) -> dict[str, ir.ExternalTensor]:
    """Weights as places in a safetensors file, to be found beside the graphs; `ties` are names of
    the same tensor.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = parse_json(path, file.read(header_bytes))
    found: dict[str, ir.ExternalTensor] = {}
    for name in (*(n for n in header if n != "__metadata__"), *ties):
        stored = header[ties.get(name, name)]
        start, stop = stored["data_offsets"]
        dtype, shape = from_torch_dtype(DTYPES[stored["dtype"]]), ir.Shape(stored["shape"])
        found[name] = ir.ExternalTensor(
            path.name, 8 + header_bytes + start, stop - start, dtype, shape=shape, name=name
        )
    return found


def program_graph(
    library: LayerLibrary,
    program: Program,
    *,
    functions: Mapping[str, ir.Function],
    weights: Mapping[str, ir.ExternalTensor],
) -> bytes:
    """The ONNX file of a program.

    Inputs are `input_ids` and `positions` i64[B, T], `logits_at` i64[B, W] and each step's slot,
    `past.0.key` [B, H, L, E], `past.0.value`, `past.1.key` ..., and `past.0.more_key_0` ... if a
    step keeps further columns; outputs `logits` [B, W, V] and `present.0.key` ...
    """
    table, links = library.table, _Links(functions, weights, dtype=library.dtype)
    ids, positions = (
        links.input(name, torch.int64, shape=["batch", "tokens"])
        for name in ("input_ids", "positions")
    )
    logits_at = links.input("logits_at", torch.int64, shape=["batch", "wanted"])
    slots = [links.slot(step, spec) for step, spec in enumerate(library.kv_specs(program))]
    length = links.add("Squeeze", [links.add("Shape", [slots[0][0]], start=2, end=3)])
    zero, one = links.constant(0), links.constant(1)
    start, head = links.step(table.prologue, "prologue"), links.step(table.epilogue, "epilogue")
    steps = []
    for step, past in zip(program.schedule(), slots, strict=True):
        symbol, name = table.layers[step.layer], f"step_{step.index}.layer_{step.layer}"
        steps.append(links.step(symbol, name, past=past, opens=step.opens, closes=step.closes))
    chain = Chain(start.code, start.weights, tuple(steps), head, links.lerp)
    values = chain.start([ids, positions, links.add("Range", [zero, length, one])])
    *_, hidden = chain.states(values, slots)
    hidden = links.add(
        "GatherND",
        [hidden, links.add("Unsqueeze", [logits_at, links.constant([-1])])],
        batch_dims=1,
    )
    links.output(
        chain.head(hidden, values),
        "logits",
        dtype=from_torch_dtype(library.dtype),
        shape=ir.Shape(["batch", "wanted", None]),
        first=True,
    )
    return links.to_bytes()


class _Links:
    """A graph of calls, as it grows."""

    def __init__(
        self,
        functions: Mapping[str, ir.Function],
        weights: Mapping[str, ir.ExternalTensor],
        *,
        dtype: torch.dtype,
    ) -> None:
        self._functions, self._weights, self._dtype = functions, weights, dtype
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._used: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: torch.dtype, *, shape: Sequence[int | str]) -> ir.Value:
        self._inputs.append(
            ir.Value(name=name, type=ir.TensorType(from_torch_dtype(dtype)), shape=ir.Shape(shape))
        )
        return self._inputs[-1]

    def slot(self, step: int, spec: KvSpec) -> list[ir.Value]:
        """The inputs that are the keys and values of a step, and its further columns."""
        names = [*(("key", "value") if spec.heads else ())]
        names += [f"more_key_{number}" for number in range(len(spec.more_columns))]
        return [
            self.input(
                f"past.{step}.{name}",
                part.dtype,
                shape=["batch", part.heads, "length", part.size],
            )
            for name, part in zip(names, spec.columns, strict=True)
        ]

    def output(
        self, value: ir.Value, name: str, *, dtype: Any, shape: Any, first: bool = False
    ) -> None:
        value.name, value.dtype, value.shape = name, dtype, shape
        self._outputs.insert(0 if first else len(self._outputs), value)

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        return self.add("Constant", [], value=ir.tensor(value, dtype=from_torch_dtype(dtype)))

    def add(self, operator: str, operands: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        self._nodes.append(ir.node(operator, operands, attributes))
        return self._nodes[-1].outputs[0]

    def lerp(self, start: ir.Value, end: ir.Value, damping: float) -> ir.Value:
        factor = self.constant(damping, self._dtype)
        return self.add("Add", [start, self.add("Mul", [self.add("Sub", [end, start]), factor])])

    def step(
        self,
        symbol: Symbol,
        name: str,
        *,
        past: Sequence[ir.Value] = (),
        opens: int = 0,
        closes: tuple[float, ...] = (),
    ) -> Step[ir.Value]:
        """A call of a function; what it leaves in its slot is an output of the graph."""
        num_results = len(self._functions[symbol.target].outputs)

        def run(given: list[ir.Value]) -> Sequence[ir.Value]:
            node = ir.node(symbol.target, given, domain=_DOMAIN, num_outputs=num_results, name=name)
            self._nodes.append(node)
            for old, new in zip(past, node.outputs[num_results - len(past) :], strict=True):
                self.output(
                    new, str(old.name).replace("past", "present"), dtype=old.dtype, shape=old.shape
                )
            return node.outputs

        weights = [self._weight(name) for name in symbol.weights]
        return Step(run, symbol.sides, weights, opens, closes)

    def _weight(self, name: str) -> ir.Value:
        if name not in self._used:
            place = self._weights[name]
            self._used[name] = ir.Value(
                name=name, type=ir.TensorType(place.dtype), shape=place.shape, const_value=place
            )
        return self._used[name]

    def to_bytes(self) -> bytes:
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._used.values()),
            name="program",
            opset_imports={"": OPSET, _DOMAIN: 1},
        )
        called = {node.op_type for node in self._nodes}
        functions = [f for name, f in self._functions.items() if name in called]
        model = ir.Model(
            graph, ir_version=_IR_VERSION, producer_name="polar_fx", functions=functions
        )
        return ir.serde.serialize_model(model).SerializeToString(deterministic=True)
