"""Regions whose artifacts go away while they are needed, and failures beside successes."""

import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations import sdpa_attention

from polar_fx.backends import AotInductorBackend, EagerBackend, Region, ShapeClass
from polar_fx.backends.base import RegionName
from polar_fx.backends.specialize import specialize
from polar_fx.capture import extension
from polar_fx.compiled import compile
from polar_fx.errors import CompileError
from polar_fx.runtime.regions import RegionTable
from polar_fx.store import ArtifactStore
from stored_models import GraphBackend, answer_of, compile_for, eager_model, sources_of
from tiny_models import make, tiny


@pytest.mark.slow
def test_a_region_that_goes_between_finding_and_loading_it_is_made_again(tmp_path: Path) -> None:
    store, backend = ArtifactStore(tmp_path / "artifacts", limit_bytes=0), GraphBackend()
    want = answer_of(compile_for(make("llama"), store, backend=backend))
    load, late = backend.load, compile_for(make("llama"), store, backend=backend)

    def evicted(files: Mapping[str, Path]) -> Region:
        backend.load = load  # type: ignore[method-assign]
        store.clear()
        return load(files)

    backend.load = evicted  # type: ignore[method-assign]
    assert (
        torch.equal(answer_of(late), want)
        and sources_of(late) == ["compiled"] * 6
        and len(backend.built) == 12
    )


def test_what_other_processes_keep_removing_is_an_error_that_names_the_limit(
    tmp_path: Path,
) -> None:
    store, keys = ArtifactStore(tmp_path / "artifacts", limit_bytes=0), []
    compiled, get_or_make = (
        compile_for(make("llama"), store, backend=GraphBackend()),
        store.get_or_make,
    )

    def elsewhere(key: str, facts: Any, make: Any) -> tuple[dict[str, Path], bool]:
        files, _ = get_or_make(key, facts, make=lambda folder: (folder / "region.pt2").touch())
        store.clear()
        keys.append(key)
        return files, False

    store.get_or_make = elsewhere  # type: ignore[method-assign]
    with pytest.raises(
        CompileError, match=r"the room of prologue for B=1 T=1 .*; raise POLAR_FX_CACHE_LIMIT"
    ):
        answer_of(compiled, tokens=1)
    assert len(keys) == 2 and len(set(keys)) == 1, "once more, and no oftener"


def test_exported_graphs_are_all_there_or_the_limit_is_named(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts", limit_bytes=0)
    compiled = compile_for(make("llama"), store, backend=GraphBackend())
    wanted = [
        *dict.fromkeys(
            compiled.linker.calls(
                compiled.default_program, ShapeClass.of(1, 1, compiled.pool.length)
            )
        )
    ]
    compiled.regions.get(wanted)
    store.clear()
    assert all(path.is_file() for path in compiled.regions.graph_files(wanted)), "made again"
    store.limit_bytes = 1
    store.clear()
    with pytest.raises(CompileError, match=r"the room of prologue .*; raise POLAR_FX_CACHE_LIMIT"):
        compiled.regions.graph_files(wanted)


@pytest.mark.parametrize(("workers", "kept"), [(0, 2), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_what_was_built_beside_a_failure_is_kept(
    workers: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, those before it; at once, all others."""
    backend, number = GraphBackend(), itertools.count(1)
    build = backend.build

    def third_fails(folder: Path) -> None:
        build(folder)
        if next(number) == 3:
            raise RuntimeError("out of luck")

    backend.build = third_fails  # type: ignore[method-assign]
    if workers:  # a thread of this process in their place: torch.export takes one at a time
        monkeypatch.setattr(
            "polar_fx.runtime.regions.ThreadPoolExecutor", lambda number: ThreadPoolExecutor(1)
        )
        monkeypatch.setattr("polar_fx.runtime.regions.describe", lambda backend: {})
        monkeypatch.setattr("polar_fx.runtime.regions._in_worker", lambda pool, job: backend.build)
    compiled = compile_for(make("llama"), False, backend=backend, workers=workers)
    with pytest.raises(CompileError, match="out of luck"):
        answer_of(compiled)
    assert len(compiled.compilations) == kept
    torch.testing.assert_close(answer_of(compiled), answer_of(eager_model()), rtol=0, atol=1e-4)
    assert len(compiled.compilations) == 6 and len(backend.built) == 7


def test_rows_whose_heads_are_folded_into_them_may_vary() -> None:
    """Whatever the number of rows in the example, the graph serves any."""
    regions = RegionTable(
        tiny("bloom").library, AotInductorBackend(), max_length=31, store=None, workers=0
    )
    source, _ = regions._source(RegionName("layer_kind_0", ShapeClass.of(3, 3, 32)))
    graph, example, dynamic = source
    exported = specialize(graph, example, dynamic=dynamic)
    rows = [v.meta["val"].shape[0] for v in exported.graph.find_nodes(op="placeholder")]
    assert {str(n) for n in rows if isinstance(n, torch.SymInt)} >= {str(rows[0]), f"4*{rows[0]}"}


class _Alone(EagerBackend):
    """Compiles in this process, one region at a time or not at all."""

    needs_shapes = True
    running = fails = False

    def compile_region(self, body: Any, example: Any, dynamic: Any) -> Region:
        if self.fails:
            raise ValueError("no such instruction\nand more")
        assert not _Alone.running
        _Alone.running = True
        time.sleep(0.005)
        _Alone.running = False
        return super().compile_region(body, example, dynamic)


def test_a_compiler_in_this_process_runs_once_at_a_time_and_names_what_it_cannot_do() -> None:
    models = [compile(make("llama", num_hidden_layers=2), _Alone(), max_length=31) for _ in "ab"]
    ids = torch.tensor([[5, 6]])
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda model: model.forward(ids), models)
    assert torch.equal(first, second)
    failing = _Alone()
    failing.fails = True
    with pytest.raises(CompileError, match=r"eager cannot compile .*: ValueError: no such instr"):
        compile(make("llama", num_hidden_layers=2), failing, max_length=31).forward(ids)


def test_expanded_heads_may_lie_in_blocks(
    monkeypatch: pytest.MonkeyPatch, traced_anew: None
) -> None:
    """As float32 runs on a GPU; torch before 2.13 cannot prove what expanding leaves behind."""
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_sdpa", extension.sdpa_attention_forward)
        patch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *given: False)
        extension.register()
        compiled = compile(make("llama"), "eager", max_length=31, cache=False)
    extension.register()
    name = compiled.library.layers[0].target
    body = compiled.library.bodies[name]
    assert any(node.target is torch.ops.aten.expand.default for node in body.graph.nodes)
    table = RegionTable(compiled.library, GraphBackend(), max_length=31, store=None, workers=0)
    for rows, tokens in ((1, 1), (2, 1), (2, 2)):
        table.one(RegionName(name, ShapeClass.of(rows, tokens, None)))
