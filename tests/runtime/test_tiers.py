"""Whole programs as one graph: right, made in the background, kept only if faster, and always
replaceable by links.
"""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polar_fx.backends import worker
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import CompileError, InputError
from polar_fx.runtime.tiers import TierPolicy
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts

DEPTH = 2  # a program is compiled by its steps
PROGRAMS = ("identity", "(0)*2@0.5 (1)*2@0.25")
ALWAYS, NEVER = -100.0, 1.0  # margins that any measurement meets, or none


def tiny() -> Any:
    return make("llama", num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    """That of all tests, some of which compile the same regions; no other compiles whole programs
    of so few layers.
    """
    return ArtifactStore()


@pytest.fixture(scope="module")
def linked(store: ArtifactStore) -> CompiledModel:
    return compile(tiny(), max_length=31, cache=store)


def run(compiled: CompiledModel, program: str, tokens: int = 6) -> Tensor:
    """Logits [1 + tokens, V] of a prompt's end and of some decoded tokens."""
    chosen = compiled.resolve(program)
    with compiled.session(chosen, 1) as session:
        rows = [compiled.prefill(chosen, session, prompts(9))[0]]
        rows += [compiled.decode(chosen, session, torch.tensor([5 + i]))[0] for i in range(tokens)]
    return torch.stack(rows)


@pytest.mark.slow
def test_a_whole_program_equals_the_linked_one(store: ArtifactStore, linked: CompiledModel) -> None:
    program = PROGRAMS[-1]  # repeats and damping
    whole = compile(tiny(), max_length=31, cache=store, tier="whole")
    assert (run(whole, program) - run(linked, program)).abs().max() < 1e-4
    assert {(r.phase, r.state) for r in whole.tiers.records} == {
        ("prefill", "whole"),
        ("decode", "whole"),
    }


@pytest.mark.slow
def test_other_prompt_lengths_need_nothing_new(store: ArtifactStore, linked: CompiledModel) -> None:
    whole = compile(tiny(), max_length=31, cache=store, tier="whole")
    run(whole, "identity")
    for length in (4, 20):
        ids = prompts(length)[0][None]
        options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
        assert torch.equal(whole.generate(ids, **options), linked.generate(ids, **options))
    assert len(whole.tiers.records) == 2


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs that workers are given."""
    seen: list[dict[str, Any]] = []
    given = worker.Worker.run

    def run(self: worker.Worker, job: dict[str, Any]) -> None:
        seen.append(job)
        given(self, job)

    monkeypatch.setattr(worker.Worker, "run", run)
    return seen


@pytest.mark.slow
def test_a_stored_whole_program_is_loaded_not_compiled(
    store: ArtifactStore, jobs: list[Any]
) -> None:
    first = compile(tiny(), max_length=31, cache=store, tier="whole")
    want = run(first, "identity")
    before = len(jobs)
    again = compile(tiny(), max_length=31, cache=store, tier="whole")
    assert torch.equal(run(again, "identity"), want)
    assert len(jobs) == before and again.compilations == ()


def promoted(store: ArtifactStore, margin: float) -> CompiledModel:
    policy = TierPolicy(hot_calls=3, trial_calls=2, margin=margin)
    return compile(tiny(), max_length=31, cache=store, tier="auto", tier_policy=policy)


def test_hot_programs_change_over_and_results_stay(
    store: ArtifactStore, linked: CompiledModel
) -> None:
    auto = promoted(store, ALWAYS)
    want = run(linked, "identity", 15)
    states = set()
    for _ in range(12):
        assert (run(auto, "identity", 15) - want).abs().max() < 1e-4
        states |= {r.state for r in auto.tiers.records}
        auto.tiers.wait()
    assert {(r.phase, r.state) for r in auto.tiers.records} == {
        ("prefill", "whole"),
        ("decode", "whole"),
    }
    assert all(r.linked_ms and r.whole_ms and "linked" in r.reason for r in auto.tiers.records)
    assert run(auto, "skip 1", 1).shape == run(linked, "skip 1", 1).shape
    assert {r.state for r in auto.tiers.records if str(r.program) != str(auto.default_program)} == {
        "cold"
    }


def test_what_is_not_faster_is_dropped_and_the_record_says_so(store: ArtifactStore) -> None:
    auto = promoted(store, NEVER)
    for _ in range(12):
        run(auto, "identity", 15)
        auto.tiers.wait()
    assert {r.state for r in auto.tiers.records} == {"linked"}
    assert all("kept only from 100 % on" in r.reason for r in auto.tiers.records)
    assert len(auto.tiers._cache) == 0


def test_requests_go_on_while_compiling_and_a_failed_compilation_changes_nothing(
    linked: CompiledModel, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def stuck(self: Any, job: dict[str, Any]) -> None:
        assert release.wait(60)
        raise CompileError("no such luck")

    auto = promoted(store, ALWAYS)
    program = "skip 0"  # not compiled by any other test
    want = run(linked, program, 15)
    run(auto, program, 0)
    monkeypatch.setattr(worker.Worker, "run", stuck)
    for _ in range(3):
        torch.testing.assert_close(run(auto, program, 15), want, rtol=0, atol=1e-4)
    assert {r.state for r in auto.tiers.records if r.phase == "decode"} == {"compiling"}
    release.set()
    auto.tiers.wait()
    torch.testing.assert_close(run(auto, program, 15), want, rtol=0, atol=1e-4)
    (record,) = [r for r in auto.tiers.records if r.phase == "decode"]
    assert record.state == "linked" and "no such luck" in record.reason
    assert store.verify() == []


@pytest.mark.slow
def test_whole_programs_beyond_the_memory_limit_are_loaded_again(
    store: ArtifactStore, linked: CompiledModel
) -> None:
    policy = TierPolicy(memory_bytes=1)
    whole = compile(tiny(), max_length=31, cache=store, tier="whole", tier_policy=policy)
    for _ in range(2):
        for program in PROGRAMS[:2]:
            assert (run(whole, program) - run(linked, program)).abs().max() < 1e-4
    assert len(whole.tiers._cache) == 1


def test_a_worker_that_was_killed_is_started_again(tmp_path: Path) -> None:
    one = worker.Worker()
    job = {
        "backend": "aot_inductor",
        "options": {},
        "passes": "",
        "threads": 1,
        "folder": str(tmp_path),
    }
    with pytest.raises(CompileError, match="compiling failed in a worker: .*graph.pt2"):
        one.run(job)
    assert one._process is not None
    first = one._process.pid
    one._process.kill()
    with pytest.raises(CompileError, match="compiling failed in a worker: .*graph.pt2"):
        one.run(job)
    assert one._process.pid != first
    one.close()


def test_policies_are_checked() -> None:
    with pytest.raises(InputError, match="trial_calls of a tier policy must be at least 1, got 0"):
        TierPolicy(trial_calls=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tier="best"), "unknown tier 'best'; known: linked, whole, auto"),
        (dict(tier="auto", cache=False), "tier='auto' needs the CPU, the artifact store"),
        (
            dict(tier="whole", backend="eager"),
            "tier='whole' needs .* a backend that compiles to files",
        ),
        (
            dict(tier="auto", deterministic=True),
            "deterministic=True needs tier='linked' or 'whole'",
        ),
    ],
)
def test_tiers_that_cannot_be_had_are_refused(
    options: dict[str, Any], message: str, store: ArtifactStore
) -> None:
    with pytest.raises(InputError, match=message):
        compile(tiny(), **{"max_length": 31, "cache": store, **options})
