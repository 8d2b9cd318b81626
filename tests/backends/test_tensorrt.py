"""The TensorRT backend: regions taken apart, what is handed to the library, and what is said where
it cannot run.

No engine is built here unless there is a GPU with torch_tensorrt; a stand-in of the library runs
the parts as they are.
"""

import importlib.metadata
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from engines_in_place import in_place
from places import GOLDEN
from polar_fx import backends, compile, compiled
from polar_fx.backends import Region, ShapeClass, TensorRTBackend
from polar_fx.backends.base import RegionName
from polar_fx.backends.experimental import tensorrt
from polar_fx.backends.experimental.tensorrt import find_library
from polar_fx.backends.experimental.tensorrt_graph import written_slots
from polar_fx.cli.inspect import GRAPHS
from polar_fx.errors import CompileError, InputError
from polar_fx.runtime.regions import RegionTable
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts, tiny

# Read from the sources in the wheels: parameters, and the operators that have a converter.
API: dict[str, dict[str, list[str]]] = json.loads(
    (GOLDEN / "torch_tensorrt.json").read_text(encoding="utf-8")
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
        self.aliased_io = given.pop("aliased_io", {})
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
        if self.aliased_io:
            in_place(exported.graph_module)

    def forward(self, *values: Tensor) -> Any:
        assert all(v.is_contiguous() for v in values)
        by_name = dict(zip(self.input_binding_names, values, strict=True))
        results = self.run(*(by_name[n] for n in self.names))
        return results[0] if len(results) == 1 else tuple(results)


class _Library:
    """Stands in for torch_tensorrt; binds inputs in another order than given, as the real one
    does. `aliases`: what `index_copy` writes is the memory of an operand, as from 2.14 on.
    """

    def __init__(self, num_engines: int = 1, *, aliases: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self.parts: list[ExportedProgram] = []
        self.Input, self.num_engines, self.aliases = _Input, num_engines, aliases
        self.dynamo = SimpleNamespace(
            compile=self.compile, runtime=SimpleNamespace(TorchTensorRTModule=_Module)
        )

    def compile(self, exported: ExportedProgram, **settings: Any) -> nn.Module:
        self.calls.append(settings)
        self.parts.append(exported)
        content = io.BytesIO()
        torch.export.save(exported, content)
        names = [n.name for n in exported.graph.find_nodes(op="placeholder")][::-1]
        results: Any = exported.graph.output_node().args[0]
        slots = written_slots(exported.graph)
        outputs = [f"output{i}" for i in range(len(results) + len(slots))]
        kinds = [(slot, "kv_cache_update") for slot in slots]
        aliased = dict(zip(outputs[len(results) :], kinds, strict=True))
        made = (
            _Module(
                serialized_engine=content.getvalue(),
                input_binding_names=names,
                output_binding_names=outputs,
                **({"aliased_io": aliased} if self.aliases else {}),
            )
            for _ in range(self.num_engines)
        )
        return nn.Sequential(*made)


def _stand_in(monkeypatch: pytest.MonkeyPatch, found: _Library, *, version: str) -> _Library:
    """The stand-in, and a GPU's name for the keys."""
    library = tensorrt.FoundLibrary(found, version, "11.0.0")
    monkeypatch.setattr(tensorrt, "find_library", lambda: library)
    monkeypatch.setattr(tensorrt, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="GPU", multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return found


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    """As it was before engines wrote in place."""
    return _stand_in(monkeypatch, _Library(), version="2.13.0")


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> _Library:
    """As it is since they do."""
    return _stand_in(monkeypatch, _Library(aliases=True), version="2.14.0")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_layer_that_decodes_one_row_is_one_engine_that_writes_its_slot(
    writing: _Library, tmp_path: Path
) -> None:
    store, ids = ArtifactStore(tmp_path / "artifacts", limit_bytes=0), prompts(9)[0][None]
    programs = ("identity", "0 (1)*2 /4")

    def run(backend: Any) -> list[Tensor]:
        model = compile(make("llama"), backend, max_length=31, cache=store)
        return [model.generate(ids, program=p, max_new_tokens=4, do_sample=False) for p in programs]

    want = run("eager")
    for got, expected in zip(run(TensorRTBackend()), want, strict=True):
        assert torch.equal(got, expected)
    written = [written_slots(part.graph) for part in writing.parts]
    assert sorted(map(len, written))[-1] == 2 and sum(map(bool, written)) == 1, "of one row's token"
    made = len(writing.parts)
    assert made == 5, "one less than in parts"
    run(TensorRTBackend())
    assert len(writing.parts) == made, "from the store, with what it writes"
    assert "aliased_io" in API["2.14.0"]["dynamo.runtime.TorchTensorRTModule"]


def _decoding_layer(backend: TensorRTBackend) -> Region:
    """A layer's region for one token of one row."""
    library = tiny("llama").library
    wanted = RegionName(library.layers[0].target, ShapeClass.of(1, 1, 32))
    return RegionTable(library, backend, max_length=31, store=None).one(wanted)


def test_a_layer_that_is_no_engine_in_place_is_taken_apart_or_an_error(
    writing: _Library, caplog: pytest.LogCaptureFixture
) -> None:
    writing.aliases = False
    assert _decoding_layer(TensorRTBackend())
    assert len(writing.parts) == 3 and "a layer is taken apart: torch_tensorrt" in caplog.text
    with pytest.raises(
        CompileError,
        match=r"one engine of a whole layer .*'whole_decode': False.* it writes {} in place",
    ):
        _decoding_layer(TensorRTBackend({"whole_decode": True}))
    assert _decoding_layer(TensorRTBackend({"whole_decode": False}))
    with pytest.raises(InputError, match=r"True, False or None, got 'no'"):
        TensorRTBackend({"whole_decode": "no"})


def test_a_slot_that_would_be_copied_is_refused(writing: _Library) -> None:
    region = _decoding_layer(TensorRTBackend())
    library = tiny("llama").library
    keys = library.table.kv_specs[0].columns[0]
    slot = torch.zeros(1, keys.heads, keys.size, 32).transpose(2, 3)
    sides = [torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.long)]
    mask = torch.ones(1, 1, 1, 32, dtype=torch.bool)
    weights = library.layers[0].weights
    with pytest.raises(InputError, match=r"contiguous, not of strides .*'whole_decode': False"):
        region([torch.zeros(1, 1, 32), *sides, mask, slot, slot.clone(), *weights])


def test_whole_layers_need_a_library_that_writes_in_place(library: _Library) -> None:
    with pytest.raises(InputError, match=r"2\.13\.0 does not write .* install 2\.14 or newer"):
        TensorRTBackend({"whole_decode": True})


def _head(backend: TensorRTBackend) -> Region:
    """The head's region for any batch and length."""
    wanted = RegionName("epilogue", ShapeClass(None, None, 32))
    return RegionTable(tiny("llama").library, backend, max_length=31, store=None).one(wanted)


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


def test_parts_that_fail_are_built_once(writing: _Library) -> None:
    """A region that is no whole engine has nothing else to try."""
    writing.num_engines = 2
    with pytest.raises(CompileError, match=r"one engine of engine_0 \(ValueError: it made 2\)"):
        _head(TensorRTBackend())
    assert len(writing.parts) == 1


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
        compiled, "load_library", lambda *a, **k: pytest.fail("the model was captured first")
    )
    with pytest.raises(CompileError, match=reason):
        compile(make("llama"), backend="tensorrt")


def test_versions_are_told_whatever_package_tensorrt_came_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def of_package(name: str) -> str:
        if name != "torch-tensorrt":  # such as tensorrt, where tensorrt-cu13 brought the module
            raise importlib.metadata.PackageNotFoundError(name)
        return f"{MINOR}.0"

    monkeypatch.setattr(importlib.metadata, "version", of_package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "torch_tensorrt.py").touch()
    (tmp_path / "tensorrt.py").write_text("__version__ = '11.1.0'")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("torch_tensorrt", "tensorrt"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    library = find_library()
    assert library.module.__name__ == "torch_tensorrt"
    assert library.versions == f"torch_tensorrt {MINOR}.0, tensorrt 11.1.0"
    for name in ("torch_tensorrt", "tensorrt"):  # set by the import, not by monkeypatch
        sys.modules.pop(name, None)


def test_it_is_known_by_name() -> None:
    assert backends.BACKENDS["tensorrt"] is TensorRTBackend and "engines" in GRAPHS


def _library_or_skip() -> Any:
    try:
        return find_library().module
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
            model.forward(ids, program=program),
            oracle.forward(ids, program=program),
            rtol=1e-3,
            atol=1e-3,
        )
