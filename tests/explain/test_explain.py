"""`CompiledModel.report` and `.explain`: right numbers, nothing traced or compiled, and a
picture.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from explained_models import KV_BYTES, LAYER_BYTES, PROGRAM, eager, fresh, round_trip
from polar_fx.backends import EagerBackend, Region, ShapeClass
from polar_fx.backends.base import RegionName
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, ProgramError
from polar_fx.explain.program_report import (
    IN_MEMORY,
    INTERPRETED,
    ON_DISK,
    TO_COMPILE,
)
from polar_fx.output.files import write_file
from polar_fx.program import Program
from polar_fx.runtime.code_key import VariantKey
from polar_fx.runtime.tiers import TierPolicy, Tiers
from polar_fx.store import ArtifactStore
from portable_regions import use_graphs
from tiny_models import make, prompts


class _Shaped(EagerBackend):
    """Interprets, but wants a region a shape class, as compilers do."""

    name = "shaped"
    needs_shapes = True
    compiled = 0

    def compile_region(self, *args: Any, **kwargs: Any) -> Region:
        type(self).compiled += 1
        return super().compile_region(*args, **kwargs)


def test_kinds_are_told_apart() -> None:
    report = eager("smollm3").report()  # its last layer has no rotary embedding
    assert [(k.body, k.layers) for k in report.kinds[1:-1]] == [
        ("layer_kind_0", (0, 1, 2)),
        ("layer_kind_1", (3,)),
    ]
    assert "layers    4 -> 2 kinds" in report.text()
    assert "layers    4 -&gt; 2 kinds" in report._repr_html_()
    rows = [
        line.split()
        for line in eager("smollm3").explain("skip 1").text().splitlines()
        if line.startswith(("0", "1", "2"))
    ]
    assert [(r[0], r[1], r[2]) for r in rows[1:]] == [
        ("0", "0", "layer_kind_0"),
        ("1", "2", "layer_kind_0"),
        ("2", "3", "layer_kind_1"),
    ]


def test_steps_own_slots_and_count_each_time() -> None:
    explanation = eager().explain(PROGRAM)
    assert [(s.index, s.layer, s.slot, s.opens, s.closes) for s in explanation.steps] == [
        (0, 0, 0, 0, ()),
        (1, 2, 1, 0, ()),
        (2, 3, 2, 0, ()),
        (3, 2, 3, 1, ()),
        (4, 3, 4, 0, (0.5,)),
    ]
    for step in explanation.steps:
        assert (step.body, step.weight_bytes) == ("layer_kind_0", LAYER_BYTES)
    assert explanation.skipped == (1,)
    shown = explanation._repr_html_()
    assert shown.count("<svg") == 1 and "one decoded token moves" in shown
    cost = explanation.cost
    assert cost.step_bytes == 5 * LAYER_BYTES
    # one row of the embedding, the rotary frequencies, the last norm and the head
    assert cost.end_bytes == 4 * (32 + 8 // 2 + 32 + 100 * 32)
    assert (cost.kv_bytes_per_token, cost.kv_read_bytes) == (5 * KV_BYTES, 5 * 32 * KV_BYTES)
    assert cost.memory_bound_bytes == cost.step_bytes + cost.end_bytes + 5 * 33 * KV_BYTES
    plain = round_trip(explanation)
    assert (
        plain["program"] == "0 (2-3)*2@0.5 /4"
        and plain["num_steps"] == 5
        and plain["skipped"] == [1]
    )
    assert plain["cost"]["memory_bound_bytes"] == cost.memory_bound_bytes
    assert [s["op"] for s in plain["segments"]] == ["keep", "skip", "repeat"]


def test_a_batch_reads_weights_once_and_slots_row_by_row() -> None:
    compiled = eager()
    one, three = compiled.explain(batch=1).cost, compiled.explain(batch=3).cost
    assert three.step_bytes == one.step_bytes and three.kv_read_bytes == 3 * one.kv_read_bytes
    assert three.end_bytes - one.end_bytes == 2 * 4 * 32, "two rows more of the embedding"
    assert "each of 3 rows" in compiled.explain(batch=3).text()
    assert fresh(deterministic=True).explain(batch=3).cost == one, "rows run one by one"


def test_a_path_without_segments_is_explained_as_well() -> None:
    explanation = eager().explain("3 1 (0-1)*2 3")
    assert explanation.segments is None and round_trip(explanation)["segments"] is None
    assert "no sequence of skip, keep and repeat segments" in explanation.text()
    assert "<b>run</b> 1 again" not in explanation.dot() and "again" in explanation.dot()


@pytest.mark.parametrize("batch", [0, -1, True, 1.5])
def test_a_bad_batch_is_refused(batch: Any) -> None:
    with pytest.raises(InputError, match=f"batch.*{batch}"):
        eager().explain(batch=batch)


def test_a_program_of_another_depth_is_refused() -> None:
    with pytest.raises(ProgramError, match="depth 8"):
        eager().explain(Program.identity(8))


def _calls_of(compiled: CompiledModel, run: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Which regions `run` calls, and how often."""
    seen: Counter[tuple[str, str]] = Counter()

    def counted(name: RegionName, region: Region) -> Region:
        def call(operands: list[torch.Tensor]) -> Any:
            seen[name.graph, str(name.shape)] += 1
            return region(operands)

        return call

    compiled.linker._linked.clear()
    compiled.runner.lockstep.plans._plans.clear()
    before = dict(compiled.regions._regions)
    compiled.regions._regions.update({n: counted(n, r) for n, r in before.items()})
    run()
    compiled.regions._regions.update(before)
    compiled.linker._linked.clear()
    compiled.runner.lockstep.plans._plans.clear()
    return seen


@pytest.mark.parametrize(
    "family,program,batch,options",
    [
        ("llama", PROGRAM, 1, {}),
        pytest.param("llama", "2", 1, {}, marks=pytest.mark.slow),
        ("gemma2", "3 0 (1-2)*3", 2, {}),
        pytest.param("gemma2", "skip 0", 3, {"deterministic": True}, marks=pytest.mark.slow),
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
    # the head runs for the last part of a prompt alone
    often = {r: times if r.region == "epilogue" else times_prefill for r in told.prefill}
    assert prefill == Counter({(r.region, r.shapes): r.calls * often[r] for r in told.prefill})
    assert decode == Counter({(r.region, r.shapes): r.calls * times for r in told.decode})
    later = compiled.explain(program, batch)
    assert {r.state for r in (*later.prefill, *later.decode)} == {IN_MEMORY} and later.missing == ()


def test_eager_regions_are_interpreted() -> None:
    explanation = eager().explain()
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
    shape = ShapeClass.of(1, 1, None)
    _plant(store, compiled.regions.key(RegionName("layer_kind_0", shape)))
    states = {(r.region, r.shapes): (r.state, r.num_bytes) for r in compiled.explain().decode}
    assert states["layer_kind_0", str(shape)] == (ON_DISK, 7)
    assert states["prologue", str(shape)] == states["epilogue", str(shape)] == (TO_COMPILE, None)


def _plant(store: ArtifactStore, key: VariantKey) -> None:
    store.get_or_make(
        key.digest,
        key.facts(),
        make=lambda folder: write_file(folder / "region.pt2", b"nothing"),
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
    own = Tiers(
        compiled.library,
        compiled.regions,
        kv_index=compiled.pool.kv_index,
        tier="auto",
        policy=TierPolicy(),
    )
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
    assert "whole is 3.0 % slower" in report.text() and round_trip(report)["tiers"][0][
        "program"
    ] == str(program)
    variant.record.calls += 1
    assert report.tiers[0].calls == 12, "a report is of its moment"
    assert (
        compiled.explain(program, batch=2).tiers == ()
        and "linked regions run batches" in compiled.explain(batch=2).text()
    )
    round_trip(explanation)
