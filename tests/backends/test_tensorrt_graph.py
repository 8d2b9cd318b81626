"""Taking a region apart for TensorRT: which operators make engines, and what stays beside them."""

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from engines_in_place import in_place
from places import GOLDEN
from polar_fx.backends import EagerBackend, Region, ShapeClass
from polar_fx.backends.base import RegionName
from polar_fx.backends.experimental.tensorrt import export_engines, profile
from polar_fx.backends.experimental.tensorrt_graph import (
    ENGINE_OPS,
    engines,
    split_for_engines,
    whole_engine,
    written_slots,
)
from polar_fx.backends.specialize import specialize
from polar_fx.compiled import CompiledModel
from polar_fx.explain.tensorrt_parts import EnginePart, partition_report, parts_of
from polar_fx.passes.base import is_size, writes
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner
from slow_cases import some_slow
from tiny_models import prompts, tiny

# sdpa; attention in operators with a cap; linear layers as addmm on flattened rows; experts
FAMILIES = ["llama", "gemma2", "gpt2", "mixtral"]

# Read from the sources in the wheels: parameters, and the operators that have a converter.
API: dict[str, dict[str, list[str]]] = json.loads(
    (GOLDEN / "torch_tensorrt.json").read_text(encoding="utf-8")
)


def _bodies(family: str) -> dict[str, GraphModule]:
    return tiny(family).library.bodies


class _Apart(EagerBackend):
    """Interprets regions that were taken apart."""

    def compile_region(self, body: GraphModule, example: Sequence[Tensor], dynamic: Any) -> Region:
        return super().compile_region(split_for_engines(body), example, dynamic)


@torch.no_grad()
def _answers(model: CompiledModel) -> list[Tensor]:
    """Logits of a ragged batch in two chunks, and of one row; tokens of a greedy decode by a
    program that repeats.
    """
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for i, row in enumerate(prompts(11, 6)):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    many = model.generate(ids[:1], program="0 (1)*2 /4", max_new_tokens=4, do_sample=False)
    return [model.forward(ids, mask), model.forward(ids[:1], program="1-2 /4"), many]


@pytest.mark.parametrize("family", some_slow(FAMILIES, FAMILIES[1:]))
def test_a_region_taken_apart_computes_the_same_bits_and_writes_the_same_slots(family: str) -> None:
    """Prefill, decode and the last step's KV writes; a wrong slot would show in the next chunk or
    token.
    """
    model, library = tiny(family).model, tiny(family).library
    apart, whole = (
        CompiledModel(
            Runner.of_model(
                model, RegionTable(library, backend, max_length=31, store=None), prefill_chunk=8
            )
        )
        for backend in (_Apart(), EagerBackend())
    )
    for got, want in zip(_answers(apart), _answers(whole), strict=True):
        assert torch.equal(got, want)


class _Whole(EagerBackend):
    """Interprets regions for their shapes; those that are whole engines, as such."""

    needs_shapes = True
    by_address = False

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.made: list[bool] = []

    def compile_region(self, body: GraphModule, example: Sequence[Tensor], dynamic: Any) -> Region:
        graph_module = specialize(body, example, dynamic=dynamic).graph_module
        engine = whole_engine(graph_module) if self.whole else None
        self.made.append(engine is not None)
        if engine is not None:
            in_place(engine.get_submodule("engine_0"))  # type: ignore[arg-type]
        return lambda operands: (engine or graph_module)(*operands)


# as FAMILIES, but the experts of a mixture are chosen by integers
@pytest.mark.parametrize(
    ("family", "is_whole"),
    [("llama", True), ("gemma2", True), ("gpt2", True), ("mixtral", False)],
)
def test_a_layer_decoding_one_row_is_one_engine_of_the_same_bits_and_slots(
    family: str, is_whole: bool
) -> None:
    model, library = tiny(family).model, tiny(family).library
    backends = _Whole(whole=True), _Whole(whole=False)
    whole, apart = (
        CompiledModel(Runner.of_model(model, RegionTable(library, b, max_length=31, store=None)))
        for b in backends
    )
    for got, want in zip(_answers(whole), _answers(apart), strict=True):
        assert torch.equal(got, want)
    assert any(backends[0].made) is is_whole and not all(backends[0].made)


def test_only_a_row_s_token_written_before_it_is_read_is_whole() -> None:
    def body_of(change: str) -> GraphModule:
        slot, value, place = torch.zeros(1, 2, 8, 4), torch.ones(1, 1, 2, 4), torch.tensor([[3]])

        class _Layer(nn.Module):
            def forward(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x, w, slot, value, place = operands
                rows = torch.arange(1)[:, None]
                early = slot.sum() if change == "read before" else 0
                early += slot[:, :, 0].sum() if change == "seen before" else 0
                torch.ops.aten.index_put_(slot, [rows, None, place], value)
                if change == "written twice":
                    torch.ops.aten.index_put_(slot, [rows, None, place], value * 2)
                read = 0 if change == "never read" else slot.sum()
                return (nn.functional.linear(x, w) + read + early,)

        operands = (torch.ones(1, 4), torch.ones(4, 4), slot, value, place)
        return torch.export.export(_Layer(), (operands,)).graph_module

    assert whole_engine(body_of("")) is not None
    for change in ("read before", "seen before", "written twice", "never read"):
        assert whole_engine(body_of(change)) is None, change
    assert whole_engine(body_of(""), keep=["aten::sum"]) is None
    assert whole_engine(split_for_engines(_bodies("llama")["epilogue"])) is None


@pytest.mark.parametrize("family", some_slow(FAMILIES, FAMILIES[1:]))
def test_engines_hold_nothing_but_listed_operators_on_floating_tensors_shorter_than_a_slot(
    family: str,
) -> None:
    found = 0
    for name, body in _bodies(family).items():
        length = next(
            (str(n.meta["val"].shape[2]) for n in body.graph.nodes if n.meta.get("role") == "kv"),
            None,
        )
        for engine in engines(split_for_engines(body)).values():
            found += 1
            for node in engine.graph.nodes:
                if is_size(node) or node.op == "output":
                    continue
                if isinstance(node.target, torch._ops.OpOverload):
                    assert node.target._schema.name in ENGINE_OPS and not writes(node), name
                for value in (
                    node.meta["val"]
                    if isinstance(node.meta["val"], (list, tuple))
                    else [node.meta["val"]]
                ):
                    sizes = [str(n) for n in value.shape]
                    assert value.is_floating_point() and length not in sizes, (name, node)
    assert found >= 2, "a model without engines shows nothing"


def test_the_report_names_what_runs_where_and_counts_engines() -> None:
    report = partition_report(tiny("llama").library)
    kinds: dict[str, list[bool]] = {}
    for name, parts in report.parts.items():
        kinds[name] = [part.engine for part in parts]
    assert kinds == {
        "epilogue": [True],
        "layer_kind_0": [False, True, False, True],
        "layer_kind_0.kv": [False, True, False],
        "prologue": [False],
    }
    attention = EnginePart(False, {"aten::index_put_": 2, "aten::scaled_dot_product_attention": 1})
    assert report.parts["layer_kind_0"][2] == attention and report.num_engines == 4
    linear = [p.operators["aten::linear"] for p in report.parts["layer_kind_0"] if p.engine]
    assert linear == [3, 4], "q, k, v before attention; its output and the feed-forward after it"
    text = report.text()
    assert (
        f"  {attention}\n" in text
        and "aten::index_put_ ×2" in text
        and text.endswith("shared by all programs")
    )
    assert text.splitlines()[-1].startswith("4 engines")


def test_operators_can_be_kept_out_of_engines() -> None:
    body = _bodies("llama")["layer_kind_0"]
    parts = parts_of(split_for_engines(body, keep=["aten::silu"]))
    assert [p.engine for p in parts[-3:]] == [True, False, True] and parts[-2].operators == {
        "aten::silu": 1
    }
    assert not engines(split_for_engines(body, keep=["aten::linear"])), (
        "without a linear layer an engine is not worth it"
    )


class _Order(nn.Module):
    """Memory that is read, then written with an engine's result, then read again; no value leads
    from write to read.
    """

    def forward(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        memory, w = operands
        before = nn.functional.linear(memory * 2.0, w)
        memory.copy_(before)
        return (before + nn.functional.linear(memory * 3.0, w),)


def test_reads_and_writes_of_one_memory_keep_their_order() -> None:
    operands = [torch.randn(2, 4), torch.randn(4, 4)]
    body = torch.export.export(_Order(), (tuple(operands),)).graph_module
    mine, theirs = copy.deepcopy(operands), copy.deepcopy(operands)
    apart = split_for_engines(body)
    assert len(engines(apart)) == 2
    assert torch.equal(apart(*mine)[0], body(*theirs)[0])
    assert torch.equal(mine[0], theirs[0])


@functools.cache
def _exported_engines(family: str) -> tuple[ExportedProgram, ...]:
    """The parts of one kind of layer and of the head, for several rows of several tokens."""
    parts = [split_for_engines(_bodies(family)[name]) for name in ("layer_kind_0", "epilogue")]
    return tuple(
        e for part in parts for e in export_engines(part, {"batch": 8, "tokens": 512}).values()
    )


def test_profiles_span_the_shape_class_up_to_the_limits() -> None:
    first, _, head = _exported_engines("llama")
    hidden = {"min_shape": (2, 2, 32), "max_shape": (8, 512, 32), "dtype": torch.float32}
    for exported in (first, head):
        (described,) = [d for d in profile(exported) if d.items() >= hidden.items()][:1]
        assert all(
            2 <= n <= most for n, most in zip(described["opt_shape"], (8, 512, 32), strict=True)
        )
    assert {"shape": (16, 32), "dtype": torch.float32} in profile(first), (
        "weights are operands of fixed size"
    )
    assert (
        not first.graph_signature.parameters
        and not first.constants
        and not first.graph_signature.buffers
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch about copying its own values
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_operator_of_an_engine_has_a_converter_once_decomposed(family: str) -> None:
    for exported in _exported_engines(family):
        used = {
            _operator(n.target)
            for n in exported.run_decompositions().graph.nodes
            if n.op == "call_function"
        }
        assert used
        for version, api in API.items():
            assert used <= set(api["converters"]), (version, used - set(api["converters"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_every_operator_of_a_whole_layer_has_a_converter_since_2_14(family: str) -> None:
    made: list[GraphModule] = []

    class _Keeps(_Whole):
        def compile_region(self, body: GraphModule, example: Any, dynamic: Any) -> Region:
            engine = whole_engine(specialize(body, example, dynamic=dynamic).graph_module)
            made.extend([engine] if engine is not None else [])
            return super().compile_region(body, example, dynamic)

    library = tiny(family).library
    wanted = RegionName(library.layers[0].target, ShapeClass.of(1, 1, 32))
    RegionTable(library, _Keeps(whole=False), max_length=31, store=None).one(wanted)
    (engine,) = made
    (exported,) = export_engines(engine, {"batch": 8, "tokens": 512}).values()
    assert len(written_slots(exported.graph)) == 2
    table = torch.export.default_decompositions()
    for kept in ("index_copy", "scaled_dot_product_attention"):  # as the library keeps them
        table.pop(getattr(torch.ops.aten, kept).default, None)
    calls = exported.run_decompositions(table).graph.nodes
    used = {_operator(n.target) for n in calls if n.op == "call_function"}
    assert "aten.index_copy.default" in used
    assert used <= set(API["2.14.0"]["converters"])


def _operator(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{target.__name__}"
    )
