"""`CompiledModel.report` and `.explain`: right numbers, nothing traced or compiled, and a
picture.
"""

import difflib
import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from places import GOLDEN
from polar_fx.backends import EagerBackend, Region, RegionName, ShapeClass
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, PolarError, ProgramError
from polar_fx.explain.program_report import (
    IN_MEMORY,
    INTERPRETED,
    ON_DISK,
    TO_COMPILE,
    Explanation,
    Report,
)
from polar_fx.output.plain_text import size
from polar_fx.program import Program
from polar_fx.runtime.code_key import VariantKey
from polar_fx.runtime.tiers import TierPolicy, Tiers
from polar_fx.store import ArtifactStore
from portable_regions import use_graphs
from tiny_models import make, prompts

PICTURE = GOLDEN / "program.dot"
PROGRAM = "0 (2-3)*2@0.5 /4"  # skip, repeat and damping
# weights of one layer of the tiny llama: attention, feed-forward, two norms; fp32
LAYER_BYTES = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
KV_BYTES = 4 * 2 * (8 + 8)  # a token and step: two heads, keys and values of 8


class _Shaped(EagerBackend):
    """Interprets, but wants a region a shape class, as compilers do."""

    name = "shaped"
    needs_shapes = True
    compiled = 0

    def compile_region(self, *args: Any, **kwargs: Any) -> Region:
        type(self).compiled += 1
        return super().compile_region(*args, **kwargs)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store", 0)


def _fresh(family: str = "llama", **options: Any) -> CompiledModel:
    return compile(make(family), "eager", max_length=31, **{"cache": False, **options})


# Shared, and never run: most tests only look.
_eager = functools.cache(_fresh)


def _round_trip(part: Report | Explanation) -> dict[str, Any]:
    plain = part.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    return plain


# ------------------------------------------------------------------------------------- looking only


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


def test_nothing_is_traced_compiled_or_touched(
    untraced: CompiledModel, store: ArtifactStore
) -> None:
    files = {p: p.lstat() for p in store.root.rglob("*")}
    report, explanation = untraced.report(), untraced.explain(PROGRAM)
    assert report.text() and explanation.text() and explanation.dot()
    _round_trip(report)
    _round_trip(explanation)
    assert (
        not untraced.library.is_traced
        and untraced.regions.records == []
        and untraced.pool.num_bytes == 0
    )
    after = {p: p.lstat() for p in store.root.rglob("*")}
    assert {p: (s.st_mtime_ns, s.st_size) for p, s in files.items()} == {
        p: (s.st_mtime_ns, s.st_size) for p, s in after.items()
    }


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
    report = _fresh(cache=store).report()
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


# ------------------------------------------------------------------------------------------ numbers


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
    compiled = _fresh(cache=store)
    assert (compiled.report().num_kv_slots, compiled.report().num_programs) == (0, 0)
    compiled.generate(prompts(5)[0][None], program=PROGRAM, max_new_tokens=2, do_sample=False)
    compiled.generate(prompts(5)[0][None], program="skip 1", max_new_tokens=2, do_sample=False)
    report = compiled.report()
    assert (report.num_kv_slots, report.kv_length, report.num_programs) == (5, 32, 2)
    assert report.kv_bytes == 5 * 32 * KV_BYTES == compiled.pool.num_bytes
    assert report.totals["held_bytes"] == report.kv_bytes + report.weight_bytes
    assert report.store is not None
    assert (report.store.num_entries, report.store.num_bytes) == (
        1,
        sum(p.stat().st_size for p in store.root.glob("objects/*/*")),
    )
    assert report.store.folder == str(store.root) and report.store.refused == ()
    assert _fresh(cache=False).report().store is None
    text = report.text()
    assert "KV pool   20.5 kB in 5 slots of 32 tokens" in text and "linked    2 programs" in text
    assert f"store     1 entry, {size(report.store.num_bytes)}, 0 refused, in {store.root}" in text
    assert _round_trip(report)["totals"] == report.totals


def test_refused_artifacts_are_named(store: ArtifactStore) -> None:
    _fresh(cache=store)
    (entry,) = store.root.glob("entries/*.json")
    entry.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polar_fx.store.store._log.warning", lambda *_: None)
        report = _fresh(cache=store).report()
    assert report.store is not None and [key for key, _ in report.store.refused] == [entry.stem]
    assert f"{entry.stem[:12]} refused: its entry is malformed" in report.text()


def test_kinds_are_told_apart() -> None:
    report = _eager("smollm3").report()  # its last layer has no rotary embedding
    assert [(k.body, k.layers) for k in report.kinds[1:-1]] == [
        ("layer_kind_0", (0, 1, 2)),
        ("layer_kind_1", (3,)),
    ]
    assert "layers    4 -> 2 kinds" in report.text()
    rows = [
        line.split()
        for line in _eager("smollm3").explain("skip 1").text().splitlines()
        if line.startswith(("0", "1", "2"))
    ]
    assert [(r[0], r[1], r[2]) for r in rows[1:]] == [
        ("0", "0", "layer_kind_0"),
        ("1", "2", "layer_kind_0"),
        ("2", "3", "layer_kind_1"),
    ]


def test_steps_own_slots_and_count_each_time() -> None:
    explanation = _eager().explain(PROGRAM)
    assert [(s.index, s.layer, s.slot, s.opens, s.closes) for s in explanation.steps] == [
        (0, 0, 0, 0, ()),
        (1, 2, 1, 0, ()),
        (2, 3, 2, 0, ()),
        (3, 2, 3, 1, ()),
        (4, 3, 4, 0, (0.5,)),
    ]
    assert {s.weight_bytes for s in explanation.steps} == {LAYER_BYTES} and {
        s.body for s in explanation.steps
    } == {"layer_kind_0"}
    assert explanation.skipped == (1,)
    cost = explanation.cost
    assert cost.step_bytes == 5 * LAYER_BYTES
    # one row of the embedding, the rotary frequencies, the last norm and the head
    assert cost.end_bytes == 4 * (32 + 8 // 2 + 32 + 100 * 32)
    assert (cost.kv_bytes_per_token, cost.kv_read_bytes) == (5 * KV_BYTES, 5 * 32 * KV_BYTES)
    assert cost.memory_bound_bytes == cost.step_bytes + cost.end_bytes + 5 * 33 * KV_BYTES
    plain = _round_trip(explanation)
    assert (
        plain["program"] == "0 (2-3)*2@0.5 /4"
        and plain["num_steps"] == 5
        and plain["skipped"] == [1]
    )
    assert plain["cost"]["memory_bound_bytes"] == cost.memory_bound_bytes
    assert [s["op"] for s in plain["segments"]] == ["keep", "skip", "repeat"]


def test_a_batch_reads_weights_once_and_slots_row_by_row() -> None:
    compiled = _eager()
    one, three = compiled.explain(batch=1).cost, compiled.explain(batch=3).cost
    assert three.step_bytes == one.step_bytes and three.kv_read_bytes == 3 * one.kv_read_bytes
    assert three.end_bytes - one.end_bytes == 2 * 4 * 32, "two rows more of the embedding"
    assert "each of 3 rows" in compiled.explain(batch=3).text()
    assert _fresh(deterministic=True).explain(batch=3).cost == one, "rows run one by one"


def test_a_path_without_segments_is_explained_as_well() -> None:
    explanation = _eager().explain("3 1 (0-1)*2 3")
    assert explanation.segments is None and _round_trip(explanation)["segments"] is None
    assert "no sequence of skip, keep and repeat segments" in explanation.text()
    assert "<b>run</b> 1 again" not in explanation.dot() and "again" in explanation.dot()


@pytest.mark.parametrize("batch", [0, -1, True, 1.5])
def test_a_bad_batch_is_refused(batch: Any) -> None:
    with pytest.raises(InputError, match=f"batch.*{batch}"):
        _eager().explain(batch=batch)


def test_a_program_of_another_depth_is_refused() -> None:
    with pytest.raises(ProgramError, match="depth 8"):
        _eager().explain(Program.identity(8))


# ------------------------------------------------------------------------------------------ regions


def _calls_of(compiled: CompiledModel, run: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Which regions `run` calls, and how often."""
    seen: Counter[tuple[str, str]] = Counter()

    def counted(name: RegionName, region: Region) -> Region:
        def call(operands: list[torch.Tensor]) -> Any:
            seen[name.graph, str(name.shape)] += 1
            return region(operands)

        return call

    compiled.linker._linked.clear()
    before = dict(compiled.regions._regions)
    compiled.regions._regions.update({n: counted(n, r) for n, r in before.items()})
    run()
    compiled.regions._regions.update(before)
    compiled.linker._linked.clear()
    return seen


@pytest.mark.parametrize(
    "family,program,batch,options",
    [
        ("llama", PROGRAM, 1, {}),
        ("llama", "2", 1, {}),
        ("gemma2", "3 0 (1-2)*3", 2, {}),
        ("gemma2", "skip 0", 3, {"deterministic": True}),
        ("llama", "skip 2", 1, {"prefill_chunk": 1}),
    ],
)
def test_the_regions_named_are_those_that_run(
    family: str, program: str, batch: int, options: dict[str, Any]
) -> None:
    """Explained before anything ran, then run and counted."""
    compiled = compile(make(family), _Shaped(), max_length=31, cache=False, **options)
    number = _Shaped.compiled
    told, chosen = compiled.explain(program, batch), compiled.resolve(program)
    assert (
        _Shaped.compiled == number
        and {r.state for r in told.prefill} == {TO_COMPILE}
        and not told.would_trace
    )
    compiled.warmup([program], batch)
    made = {(r.body, r.shapes) for r in compiled.regions.records}
    assert (
        made == set(told.missing) == {(r.region, r.shapes) for r in (*told.prefill, *told.decode)}
    )
    assert _Shaped.compiled - number == len(made)
    rows, times = prompts(*[3] * batch), batch if options.get("deterministic") else 1
    times_prefill = times * (3 if options.get("prefill_chunk") else 1)
    with compiled.session(chosen, batch) as session:
        prefill = _calls_of(compiled, lambda: compiled.prefill(chosen, session, rows))
        decode = _calls_of(
            compiled, lambda: compiled.decode(chosen, session, torch.ones(batch, dtype=torch.long))
        )
    assert prefill == Counter({(r.region, r.shapes): r.calls * times_prefill for r in told.prefill})
    assert decode == Counter({(r.region, r.shapes): r.calls * times for r in told.decode})
    later = compiled.explain(program, batch)
    assert {r.state for r in (*later.prefill, *later.decode)} == {IN_MEMORY} and later.missing == ()


def test_eager_regions_are_interpreted() -> None:
    explanation = _eager().explain()
    assert {(r.region, r.calls) for r in explanation.decode} == {
        ("prologue", 1),
        ("layer_kind_0", 4),
        ("epilogue", 1),
    }
    assert {(r.shapes, r.state) for r in (*explanation.prefill, *explanation.decode)} == {
        ("any", INTERPRETED)
    }
    assert (
        not explanation.missing
        and not explanation.would_trace
        and "the first call will" not in explanation.text()
    )


def test_regions_on_disk_are_seen(store: ArtifactStore) -> None:
    compiled = compile(make("llama"), "aot_inductor", max_length=31, cache=store)
    shape = ShapeClass.of(1, 1, compiled.pool.length)
    _plant(store, compiled.regions.key(RegionName("layer_kind_0", shape)))
    states = {(r.region, r.shapes): (r.state, r.num_bytes) for r in compiled.explain().decode}
    assert states["layer_kind_0", str(shape)] == (ON_DISK, 7)
    assert states["prologue", str(shape)] == states["epilogue", str(shape)] == (TO_COMPILE, None)


def _plant(store: ArtifactStore, key: VariantKey) -> None:
    store.get_or_make(
        key.digest,
        key.facts(),
        lambda folder: (folder / "region.pt2").write_bytes(b"nothing") and None,
    )


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: ArtifactStore) -> ArtifactStore:
    """A store in which one program's regions were made: those of one token, without a compiler."""
    use_graphs(monkeypatch, tmp_path / "cache")
    compiled = _compiled(store)
    compiled.warmup()
    totals = compiled.report().totals
    assert (totals["num_compiled"], totals["num_loaded"]) == (3, 0) and totals[
        "slowest_compiled_s"
    ] > 0
    return store


def _compiled(store: ArtifactStore) -> CompiledModel:
    return compile(make("llama"), "aot_inductor", max_length=31, prefill_chunk=1, cache=store)


def test_a_warm_start_loads_and_captures_nothing(warm: ArtifactStore) -> None:
    compiled = _compiled(warm)
    cold = compiled.explain("skip 1")
    assert {r.state for r in cold.decode} == {ON_DISK} and not cold.missing and not cold.would_trace
    sizes = {e.num_bytes for e in warm.entries()}
    assert {r.num_bytes for r in cold.decode} <= sizes
    compiled.warmup(["skip 1"])
    report = compiled.report()
    assert {r.source for r in report.regions} == {"loaded"} and report.totals["num_loaded"] == 3
    assert not report.is_traced and report.passes == () and report.capture_s is None
    assert report.totals["region_bytes"] == sum(r.num_bytes for r in cold.decode if r.num_bytes)
    text = report.text()
    assert "0 compiled, 3 loaded in" in text and "nothing was traced" in text
    assert text.count("loaded  ") >= 3 and {r.state for r in compiled.explain("skip 1").decode} == {
        IN_MEMORY
    }


# -------------------------------------------------------------------------------------------- tiers


def test_the_whole_form_of_a_program(store: ArtifactStore) -> None:
    """States without compiling any: a stored artifact is planted under the key that the tiers would
    look for.
    """
    compiled = compile(
        make("llama"),
        "aot_inductor",
        max_length=31,
        cache=store,
        tier="auto",
        tier_policy=TierPolicy(hot_calls=9),
    )
    program, shape = compiled.resolve(PROGRAM), ShapeClass.of(1, 20, compiled.pool.length)
    explanation = compiled.explain(program)
    assert [(t.phase, t.record, t.is_on_disk) for t in explanation.tiers] == [
        ("prefill", None, False),
        ("decode", None, False),
    ]
    own = Tiers(compiled.library, compiled.regions, compiled.pool.kv_index, "auto", TierPolicy())
    _plant(store, own.key(program, shape.decode))
    variant = compiled.tiers._variant(program, shape)
    variant.record.state, variant.record.calls, variant.record.reason = (
        "linked",
        12,
        "whole is 3.0 % slower than linked",
    )
    explanation = compiled.explain(program)
    prefill, decode = explanation.tiers
    assert (
        prefill.record == variant.record
        and not prefill.is_on_disk
        and decode.record is None
        and decode.is_on_disk
    )
    assert "prefill: linked, 12 calls (whole is 3.0 % slower than linked)" in explanation.text()
    assert "decode: cold, not called yet, whole form on disk" in explanation.text()
    report = compiled.report()
    assert report.tier == "auto" and [(t.program, t.calls) for t in report.tiers] == [(program, 12)]
    assert "whole is 3.0 % slower" in report.text() and _round_trip(report)["tiers"][0][
        "program"
    ] == str(program)
    variant.record.calls += 1
    assert report.tiers[0].calls == 12, "a report is of its moment"
    assert (
        compiled.explain(program, batch=2).tiers == ()
        and "linked regions run batches" in compiled.explain(batch=2).text()
    )
    _round_trip(explanation)


# ----------------------------------------------------------------------------------------- pictures


def _golden() -> str:
    return _eager("smollm3").explain(PROGRAM).dot()


def test_golden_dot() -> None:
    want, got = PICTURE.read_text(encoding="utf-8"), _golden()
    diff = "\n".join(
        difflib.unified_diff(want.splitlines(), got.splitlines(), "golden", "now", lineterm="")
    )
    assert got == want, (
        f"{diff}\nif that is meant: PYTHONPATH=tests/support python tests/explain/test_explain.py"
    )


@pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz is not installed (apt install graphviz)"
)
def test_svg(tmp_path: Path) -> None:
    path = _eager("smollm3").explain(PROGRAM).svg(tmp_path / "p.svg")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<?xml") and all(
        word in text for word in ("prologue", "repeat", "skip", "x2 @0.5", "epilogue")
    )


def test_without_graphviz_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PolarError, match=r"apt install graphviz.*\.dot\(\)"):
        _eager().explain().svg(tmp_path / "p.svg")
    assert not (tmp_path / "p.svg").exists()


if __name__ == "__main__":
    PICTURE.write_text(_golden(), encoding="utf-8")
