"""Reports of a whole model: every tensor once, slots, programs, what the store holds."""

from pathlib import Path
from typing import Any

import pytest

from explained_models import KV_BYTES, LAYER_BYTES, PROGRAM, fresh, round_trip
from polar_fx.backends.base import RegionName, ShapeClass
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.backends.specialize import graph_of, load_graph
from polar_fx.compiled import CompiledModel, compile
from polar_fx.explain.program_report import TO_COMPILE
from polar_fx.output.plain_text import size
from polar_fx.store import ArtifactStore
from stored_models import GraphBackend
from tiny_models import make, prompts


@pytest.fixture
def untraced(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> CompiledModel:
    """A model whose symbol table was on disk, and which can neither be traced nor compiled."""
    compile(make("llama"), "eager", max_length=31, cache=store)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this may only look")

    monkeypatch.setattr("polar_fx.library.cached.capture_checked", refuse)
    compiled = compile(make("llama"), "aot_inductor", max_length=31, cache=store)
    for name in (
        "runtime.regions.RegionTable._make",
        "store.ArtifactStore.get",
        "store.ArtifactStore.get_or_make",
    ):
        monkeypatch.setattr(f"polar_fx.{name}", refuse)
    return compiled


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file was written, and its size."""
    found: dict[Path, tuple[int, int]] = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[path] = (state.st_mtime_ns, state.st_size)
    return found


def test_nothing_is_traced_compiled_or_touched(
    untraced: CompiledModel, store: ArtifactStore
) -> None:
    before = states(store.root)
    report, explanation = untraced.report(), untraced.explain(PROGRAM)
    assert report.text() and explanation.text() and explanation.dot()
    round_trip(report)
    round_trip(explanation)
    assert (
        not untraced.library.is_traced
        and untraced.regions.records == []
        and untraced.pool.num_bytes == 0
    )
    assert states(store.root) == before


def test_an_untraced_model_says_so(untraced: CompiledModel) -> None:
    report, explanation = untraced.report(), untraced.explain()
    assert (report.is_traced, report.capture_s, report.layer_path, report.passes) == (
        False,
        None,
        None,
        (),
    )
    assert (
        "from the symbol table on disk; nothing was traced" in report.text()
        and "what it did" not in report.text()
    )
    assert explanation.would_trace and len(explanation.missing) == 6
    assert {r.state for r in (*explanation.prefill, *explanation.decode)} == {TO_COMPILE}
    assert "the first call will trace the model and compile 6 regions" in explanation.text()


def test_a_traced_model_says_how(store: ArtifactStore) -> None:
    report = fresh(cache=store).report()
    assert report.is_traced and report.layer_path == "model.layers" and report.capture_s is not None
    text = report.text()
    assert f"captured  in {report.capture_s:.1f} s, layers at model.layers" in text
    assert [p.name for p in report.passes] == [
        "eliminate-noops",
        "eliminate-dead-code",
        "outline-layers",
        "dedupe-layers",
    ]
    assert (
        "layer graphs 4 -> 1" in text
        and "LlamaConfig: 4 layers, float32 on cpu, backend eager" in text
    )


class _Rewriting(GraphBackend):
    """Runs the passes of `aot_inductor` on each graph, and keeps the graph."""

    def build(self, folder: Path) -> None:
        super().build(folder)
        graph_of(load_graph(folder / "graph.pt2"), REGION_PASSES)


def test_a_region_keeps_what_passes_did_to_its_graph(store: ArtifactStore) -> None:
    one = compile(make("llama"), _Rewriting(), max_length=31, cache=store)
    name = RegionName("layer_kind_0", ShapeClass.of(1, 1, None), kv_writes=True)
    one.regions.one(name)
    passes = one.report().regions[0].passes
    of_backend = [(p.name, p.name == "linear-to-row-kernel") for p in REGION_PASSES]
    assert [(p.name, p.modified) for p in passes] == [
        ("address-kv", True),
        ("keep-kv-writes", True),
        *of_backend,
    ]
    (rewritten,) = (p for p in passes if p.name == "linear-to-row-kernel")
    assert rewritten.counts == {"linears rewritten": 2, "calls": 1}, "for keys and for values"
    assert "linears rewritten 2" in one.report().text()
    round_trip(one.report())

    again = compile(make("llama"), _Rewriting(), max_length=31, cache=store)
    again.regions.one(name)
    assert [(r.source, r.passes) for r in again.report().regions] == [("loaded", ())]
    assert "linears rewritten" not in again.report().text()


def _weight_bytes(compiled: CompiledModel) -> int:
    """Independent of the report: by storages."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in compiled.library.tensors.values()
    }
    return sum(storages.values())


@pytest.mark.parametrize("tied", [False, True])
def test_report_counts_every_tensor_once(tied: bool) -> None:
    model = make("llama", tie_word_embeddings=tied)
    compiled = compile(model, "eager", max_length=31, cache=False)
    report = compiled.report()
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    frequencies = 4 * 8 // 2
    assert report.weight_bytes == own + frequencies == _weight_bytes(compiled)
    assert report.num_weights == len(list(model.parameters())) + 1
    assert [(k.body, k.layers, k.weight_bytes) for k in report.kinds[1:-1]] == [
        ("layer_kind_0", (0, 1, 2, 3), LAYER_BYTES)
    ]


def test_report_counts_slots_programs_and_the_store(store: ArtifactStore) -> None:
    compiled = fresh(cache=store)
    assert (compiled.report().num_kv_slots, compiled.report().num_programs) == (0, 0)
    compiled.generate(prompts(5)[0][None], program=PROGRAM, max_new_tokens=2, do_sample=False)
    compiled.generate(prompts(5)[0][None], program="skip 1", max_new_tokens=2, do_sample=False)
    report = compiled.report()
    # of five steps, and one that no row holds
    assert (report.num_kv_slots, report.num_kv_blocks, report.num_programs) == (0, 6, 2)
    assert report.kv_bytes == 6 * 16 * KV_BYTES == compiled.runner.lockstep.store.num_bytes
    assert report.totals["held_bytes"] == report.kv_bytes + report.weight_bytes
    assert report.store is not None
    assert (report.store.num_entries, report.store.num_bytes) == (
        1,
        sum(p.stat().st_size for p in store.root.glob("objects/*/*")),
    )
    assert report.store.folder == str(store.root) and report.store.refused == ()
    assert fresh(cache=False).report().store is None
    text = report.text()
    assert (
        "KV pool   12.3 kB in 0 slots of 32 tokens and 6 blocks of 16 tokens" in text
        and "linked    2 programs" in text
    )
    assert f"store     1 entry, {size(report.store.num_bytes)}, 0 refused, in {store.root}" in text
    assert round_trip(report)["totals"] == report.totals


def test_refused_artifacts_are_named(store: ArtifactStore) -> None:
    fresh(cache=store)
    (entry,) = store.root.glob("entries/*.json")
    entry.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polar_fx.store.store._log.warning", lambda *_: None)
        report = fresh(cache=store).report()
    assert report.store is not None and [key for key, _ in report.store.refused] == [entry.stem]
    assert f"{entry.stem[:12]} refused: its entry is malformed" in report.text()
