"""The TensorRT backend: regions taken apart, what is handed to the library, and what is said where
it cannot run.

No engine is built here unless there is a GPU with torch_tensorrt; a stand-in of the library runs
the parts as they are.
"""

import functools
import importlib.metadata
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from places import GOLDEN
from polar_fx import backends, compile, compiled
from polar_fx.backends import EagerBackend, Region, ShapeClass, TensorRTBackend
from polar_fx.backends.base import RegionName
from polar_fx.backends.experimental import tensorrt
from polar_fx.backends.experimental.tensorrt import export_engines, find_library, profile
from polar_fx.backends.experimental.tensorrt_graph import ENGINE_OPS, engines, split_for_engines
from polar_fx.cli.inspect import GRAPHS
from polar_fx.compiled import CompiledModel
from polar_fx.errors import CompileError, InputError
from polar_fx.explain.tensorrt_parts import EnginePart, partition_report, parts_of
from polar_fx.passes.base import writes
from polar_fx.passes.outline_layers import is_size
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts, tiny

# Read from the sources in the wheels: parameters, and the operators that have a converter.
API: dict[str, dict[str, list[str]]] = json.loads(
    (GOLDEN / "torch_tensorrt.json").read_text(encoding="utf-8")
)

# sdpa; attention in operators with a cap; linear layers as addmm on flattened rows; experts
FAMILIES = ["llama", "gemma2", "gpt2", "mixtral"]


def _bodies(family: str) -> dict[str, GraphModule]:
    return tiny(family).library.bodies


# ------------------------------------------------------------------------------ regions taken apart


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
    return [model(ids, mask), model(ids[:1], program="1-2 /4"), many]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_region_taken_apart_computes_the_same_bits_and_writes_the_same_slots(family: str) -> None:
    """Prefill, decode and the last step's KV writes; a wrong slot would show in the next chunk or
    token.
    """
    model, library = tiny(family).model, tiny(family).library
    apart, whole = (
        CompiledModel(
            Runner.of_model(model, RegionTable(library, backend, 31, None), prefill_chunk=8)
        )
        for backend in (_Apart(), EagerBackend())
    )
    for got, want in zip(_answers(apart), _answers(whole), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
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
                    assert value.is_floating_point() and length not in map(str, value.shape), (
                        name,
                        node,
                    )
    assert found >= 2, "a model without engines shows nothing"


def test_the_report_names_what_runs_where_and_counts_engines() -> None:
    report = partition_report(tiny("llama").library)
    kinds = {name: [p.engine for p in parts] for name, parts in report.parts.items()}
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
    copies = [[o.clone() for o in operands] for _ in range(2)]
    apart = split_for_engines(body)
    assert len(engines(apart)) == 2
    assert torch.equal(apart(*copies[0])[0], body(*copies[1])[0]) and torch.equal(
        copies[0][0], copies[1][0]
    )


# -------------------------------------------------------------------- what is handed to the library


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


def _operator(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{target.__name__}"
    )


class _Input:
    def __init__(self, **described: Any) -> None:
        self.described = described


class _Module(nn.Module):
    """Stands in for the library's module around an engine.

    The engine's bytes are those of the exported part.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        assert given.keys() <= set.intersection(
            *(set(a["dynamo.runtime.TorchTensorRTModule"]) for a in API.values())
        )
        self.serialized_engine = given["serialized_engine"]
        self.input_binding_names, self.output_binding_names = (
            given["input_binding_names"],
            given["output_binding_names"],
        )
        exported = torch.export.load(io.BytesIO(self.serialized_engine))
        self.names, self.run = (
            [n.name for n in exported.graph.find_nodes(op="placeholder")],
            exported.graph_module,
        )

    def forward(self, *values: Tensor) -> Any:
        assert all(v.is_contiguous() for v in values)
        by_name = dict(zip(self.input_binding_names, values, strict=True))
        results = self.run(*(by_name[n] for n in self.names))
        return results[0] if len(results) == 1 else tuple(results)


class _Library:
    """Stands in for torch_tensorrt; binds inputs in another order than given, as the real one
    does.
    """

    def __init__(self, num_engines: int = 1) -> None:
        self.calls: list[dict[str, Any]] = []
        self.Input, self.num_engines = _Input, num_engines
        self.dynamo = SimpleNamespace(
            compile=self.compile, runtime=SimpleNamespace(TorchTensorRTModule=_Module)
        )

    def compile(self, exported: ExportedProgram, **settings: Any) -> nn.Module:
        self.calls.append(settings)
        content = io.BytesIO()
        torch.export.save(exported, content)
        names = [n.name for n in exported.graph.find_nodes(op="placeholder")][::-1]
        results: Any = exported.graph.output_node().args[0]
        outputs, engine = [f"output{i}" for i in range(len(results))], content.getvalue()
        made = (
            _Module(
                serialized_engine=engine, input_binding_names=names, output_binding_names=outputs
            )
            for _ in range(self.num_engines)
        )
        return nn.Sequential(*made)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    """The stand-in, and a GPU's name for the keys."""
    found = _Library()
    monkeypatch.setattr(
        tensorrt, "find_library", lambda: (found, "torch_tensorrt 2.13.0, tensorrt 11.0.0")
    )
    monkeypatch.setattr(tensorrt, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="GPU", multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return found


def test_regions_are_built_once_stored_and_run(
    library: _Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `compile`, with everything real but the library: layers and programs share engines, a
    second model builds none.
    """
    store, ids = ArtifactStore(tmp_path / "artifacts", limit_bytes=0), prompts(9)[0][None]

    def run(backend: Any) -> Tensor:
        model = compile(make("llama"), backend, max_length=31, cache=store)
        out = [
            model.generate(ids, program=p, max_new_tokens=3, do_sample=False)
            for p in ("identity", "0 (1)*2 /4")
        ]
        return torch.stack([o[0] for o in out])

    want = run("eager")
    assert torch.equal(run(TensorRTBackend({"optimization_level": 2})), want)
    # prefill: a layer's first part, its KV writes; decode: a layer's two parts and the head; and
    # the layer's second for prefill
    assert len(library.calls) == 6
    again = library.calls[:]
    assert (
        torch.equal(run(TensorRTBackend({"optimization_level": 2})), want)
        and library.calls == again
    ), "from the store"

    settings = library.calls[0]
    assert all(settings.keys() <= set(api["dynamo.compile"]) for api in API.values())
    assert (
        settings["require_full_compilation"]
        and settings["min_block_size"] == 1
        and settings["optimization_level"] == 2
    )
    assert settings["disable_tf32"] is True and not settings.keys() & {
        "max_batch",
        "max_tokens",
        "torch_executed_ops",
    }
    assert Path(settings["timing_cache_path"]).is_relative_to(tensorrt.cache_dir())
    described = [i.described for call in library.calls for i in call["arg_inputs"][0]]
    assert all(d.keys() <= set(api["Input"]) for d in described for api in API.values())
    assert {
        d["max_shape"][1] for d in described if "max_shape" in d and d["max_shape"][-1] == 32
    } == {512}

    (backend,) = {e.facts["backend"] for e in store.entries() if e.facts["kind"] == "region"}
    assert backend == "tensorrt torch_tensorrt 2.13.0, tensorrt 11.0.0, GPU with 8 multiprocessors"


def _head(backend: TensorRTBackend) -> Region:
    """The head's region for any batch and length."""
    wanted = RegionName("epilogue", ShapeClass(None, None, 32))
    return RegionTable(tiny("llama").library, backend, 31, None).one(wanted)


def test_calls_beyond_the_limits_and_bad_limits_are_refused(library: _Library) -> None:
    head = _head(TensorRTBackend({"max_batch": 4}))
    with pytest.raises(
        InputError, match=r"5 rows of 3 tokens are more than .* \(4 rows, 512 tokens\).*'max_batch'"
    ):
        head([torch.ones(5, 3, 32), *tiny("llama").library.epilogue.weights])
    with pytest.raises(
        InputError, match=r"max_tokens of the tensorrt backend must be at least 128, got 64"
    ):
        TensorRTBackend({"max_tokens": 64})


def test_a_part_that_the_library_splits_again_is_an_error(library: _Library) -> None:
    library.num_engines = 2
    with pytest.raises(
        CompileError,
        match=(
            r"does not make one engine of engine_0 \(ValueError: it made 2\); "
            r".*'torch_executed_ops'"
        ),
    ):
        _head(TensorRTBackend())


# ------------------------------------------------------------------------------ where it cannot run


def _installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)


MINOR = ".".join(torch.__version__.split(".")[:2])
UNUSABLE = {
    "missing": (None, True, r"not installed; run `pip install polar_fx\[tensorrt\]`"),
    "for another torch": (
        "2.1.0",
        True,
        rf"2\.1\.0 is made for torch 2\.1, but torch is .*'torch-tensorrt=={MINOR}\.\*'",
    ),
    "no GPU": (f"{MINOR}.0", False, r"needs an NVIDIA GPU, and torch sees none"),
    "broken": (
        f"{MINOR}.0",
        True,
        r"installed but does not import: no libnvinfer; install it again",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_where_it_cannot_run_the_reason_comes_before_any_work(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version, gpu, reason = UNUSABLE[case]
    _installed(monkeypatch, version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (tmp_path / "torch_tensorrt.py").write_text("raise Exception('no libnvinfer')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(
        compiled, "load_library", lambda *a: pytest.fail("the model was captured first")
    )
    with pytest.raises(CompileError, match=reason):
        compile(make("llama"), backend="tensorrt")


def test_it_is_known_by_name() -> None:
    assert backends.BACKENDS["tensorrt"] is TensorRTBackend and "engines" in GRAPHS


# ------------------------------------------------------------------------------- the library itself


def _library_or_skip() -> Any:
    try:
        return find_library()[0]
    except CompileError as error:
        pytest.skip(str(error))


def test_the_installed_library_has_the_recorded_interface() -> None:
    import inspect

    real = _library_or_skip()
    wanted = set(inspect.signature(real.dynamo.compile).parameters)
    assert {
        "arg_inputs",
        "min_block_size",
        "require_full_compilation",
        "disable_tf32",
        "timing_cache_path",
    } <= wanted
    module = set(inspect.signature(real.dynamo.runtime.TorchTensorRTModule).parameters)
    assert {"serialized_engine", "input_binding_names", "output_binding_names", "name"} <= module


def test_engines_compute_what_the_interpreter_computes(tmp_path: Path) -> None:
    _library_or_skip()
    ids = prompts(9)[0][None].cuda()
    model, oracle = (
        compile(make("llama").cuda(), b, max_length=31, cache=False) for b in ("tensorrt", "eager")
    )
    for program in ("identity", "0 (1)*2 /4"):
        torch.testing.assert_close(
            model(ids, program=program), oracle(ids, program=program), rtol=1e-3, atol=1e-3
        )
