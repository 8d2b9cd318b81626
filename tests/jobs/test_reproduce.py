"""From nothing to tables on a tiny model: both protocols, an interruption, wrong input.

Random weights answer nothing, so what is right is said here; and how fast the machine is, so that
the smallest plan is followed. Everything else is as it is.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from polar_fx import compiled, models
from polar_fx.cli import main
from polar_fx.errors import InputError, TrainingError
from polar_fx.evaluation import baselines
from polar_fx.jobs import evaluate, reproduce, search, stages, train
from polar_fx.jobs.fit import PRESETS
from polar_fx.jobs.opening import open_job
from polar_fx.jobs.progress import silent_console
from polar_fx.jobs.questions import Asked, own_split
from polar_fx.jobs.reproduce import ReproduceJob, plan, run
from polar_fx.jobs.reproduction_plan import Measured
from polar_fx.jobs.stages import Probe, Stages
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question, split_of
from polar_fx.search.records.record_file import RecordReader
from polar_fx.search.workers import Workplace
from tiny_search import save_tiny

DEPTH = 6
RIGHT = [Program.parse(text, DEPTH) for text in ("0-5", "skip 5", "repeat 4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    lines = []
    for split, count in (("train", 24), ("val", 16)):
        for i in range(count):
            text = f"{'abc'[i % 3]} {split} {i}?"
            row = {"question": text, "answer": str(i), "split": split, "tier": 1 + i % 2}
            lines.append(json.dumps({"id": f"{split}-{i}", **row}) + "\n")
    (made / "tiers.jsonl").write_text("".join(lines))
    (made / "ids.txt").write_text("train-0\ntrain-7\nelsewhere\n")
    return made


@pytest.fixture(autouse=True, scope="module")
def opened_once() -> Iterator[None]:
    """The model is loaded and captured once for all tests and stages that want rows as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", cache(models.load))
        patch.setattr(compiled, "compile", cache(compiled.compile))
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of questions, one for each program that ran on one."""
    found: list[str] = []

    def evaluate(self: Any, pairs: Sequence[tuple[EncodedQuestion, Program]]) -> list[Verdict]:
        found.extend(question.id for question, _ in pairs)
        rights = [program == RIGHT[sum(q.prompt) % 3] for q, program in pairs]
        return [Verdict(right, -0.1 if right else -4.0, 1.0 if right else -1.0) for right in rights]

    monkeypatch.setattr(TeacherForcing, "evaluate", evaluate)
    monkeypatch.setattr(reproduce, "has_matplotlib", lambda: False)
    measured = Measured(verdicts=Probe(50.0, 1.0), answering=None, seconds=2.0)
    monkeypatch.setattr(reproduce, "_measure", lambda *_, **__: measured)
    return found


def job_of(folder: Path, out: Path, **more: Any) -> ReproduceJob:
    workplace = Workplace(model=str(folder), backend="eager")
    return ReproduceJob(out=out, budget=0.06, workplace=workplace, **more)


def paper(folder: Path, out: Path, **more: Any) -> ReproduceJob:
    data = (folder / "tiers.jsonl",)
    return job_of(folder, out, protocol="paper", data=data, leave_out=folder / "ids.txt", **more)


def test_from_nothing_to_tables(
    folder: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(reproduce, "has_matplotlib", lambda: True)
    monkeypatch.setattr(reproduce, "TASKS", ("addition", "subtraction"))
    made = plan(job_of(folder, out))
    assert not asked, "a plan alone asks nothing more"
    found = run(job_of(folder, out))
    assert found.plan == made and made.total <= 0.06 * 3600
    searched = {r.question.id for r in RecordReader(out / "search.jsonl")}
    tested = {r.question.id for r in RecordReader(out / "report" / "verdicts.jsonl")}
    assert len(searched) == made.size.searched and len(tested) == made.size.tested
    assert set(map(split_of, searched)) == {"train"} and set(map(split_of, tested)) == {"test"}
    tables = (out / "tables.md").read_text(encoding="utf-8")
    verdict = found.conclusion.splitlines()[-1]
    assert f"**{verdict}**" in tables and "| overall | identity |" in tables
    assert "PoLar network, first of beam" in tables and "Holm" in tables
    results = json.loads((out / "results.json").read_text())
    assert results["plan"] == made.to_dict() and results["environment"]["torch"]
    assert set(results["seconds"]) == {"measure", "search", "train", "evaluate"}
    arms = {row["arm"] for row in results["test"]["arms"]}
    assert {"identity", "selector: accuracy", "selector: pass@5 (oracle)"} <= arms
    assert all(path.is_file() for path in found.files)
    assert "![gains](report/gains.svg)" in tables
    slower = replace(job_of(folder, out), seed=1)
    with pytest.raises(InputError, match="other settings: seed 0, not 1"):
        run(slower)


def test_an_interrupted_run_goes_on(
    folder: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in each of its stages, after some questions of it."""
    out = tmp_path / "out"
    kept = b""
    for stage, calls in (("find_programs", 3), ("learn", 4), ("test", 1)):
        with monkeypatch.context() as patch:
            stop_in(stage, calls, patch=patch)
            with pytest.raises(KeyboardInterrupt):
                run(paper(folder, out))
        if stage == "find_programs":
            kept = (out / "plan.json").read_bytes()
    found = run(paper(folder, out))
    assert (out / "plan.json").read_bytes() == kept, "the first plan is followed"
    assert (out / "tables.md").is_file() and min(found.seconds.values()) > 0


def stop_in(stage: str, calls: int, *, patch: pytest.MonkeyPatch) -> None:
    """Interrupt the stage when it asks for verdicts after so many calls, or when it ends."""
    whole, stopped = TeacherForcing.evaluate, getattr(Stages, stage)

    def evaluate(self: Any, pairs: Any) -> Any:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return whole(self, pairs)

    def stop_later(self: Stages, console: Any) -> Any:
        patch.setattr(TeacherForcing, "evaluate", evaluate)
        stopped(self, console)
        raise KeyboardInterrupt

    patch.setattr(Stages, stage, stop_later)


@pytest.mark.slow
def test_the_papers_protocol(folder: Path, tmp_path: Path, asked: list[str]) -> None:
    out = tmp_path / "out"
    found = run(paper(folder, out))
    tables = (out / "tables.md").read_text(encoding="utf-8")
    assert "Of 3 ids to leave out, 2 were of train questions" in tables
    assert "half of the validation questions of each tier" in tables
    for tier in ("tier 1", "tier 2", "overall"):
        assert f"| {tier} | identity | " in tables
    assert "### Generated answers" in tables and "selector: pass@3 (oracle)" in tables
    results = json.loads((out / "results.json").read_text())
    assert results["test"]["prompts"] == {"tier 1": "direct@1", "tier 2": "direct@1"}
    assert {"train-0", "train-7"}.isdisjoint(asked)
    tested = {r.question.id for r in RecordReader(out / "report" / "verdicts.jsonl")}
    learned = set()
    for part in (out / "predictor" / "parts").glob("*.jsonl"):
        learned |= {r.question.id for r in RecordReader(part)}
    assert tested and tested.isdisjoint(learned)
    assert len(tested) == found.plan.size.tested == 8
    before = len(asked)
    assert run(paper(folder, out)).conclusion == found.conclusion
    assert len(asked) == before, "nothing is asked twice"


def test_where_the_model_answers_nothing_baselines_are_left_out(
    folder: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "RIGHT", [Program.parse("skip 5", DEPTH)] * 3)
    run(paper(folder, tmp_path / "out"))
    tables = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "The model as it is answers none of the train questions" in tables
    assert "PoLar network" not in tables


def test_a_predictor_that_cannot_be_trained_is_left_out_with_the_reason(
    folder: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every program is right on all questions."""
    monkeypatch.setitem(globals(), "RIGHT", [ANY] * 3)
    out = tmp_path / "out"
    monkeypatch.setattr(reproduce, "TASKS", ("addition",))
    found = run(job_of(folder, out))
    reason = "no predictor could be trained, and nothing was tested: every program is right on all"
    assert found.conclusion.startswith(reason)
    tables = (out / "tables.md").read_text(encoding="utf-8")
    assert f"**{reason}" in tables and "## What the search found" in tables
    assert "## Test" not in tables and "No test question was asked." in tables
    assert json.loads((out / "results.json").read_text())["test"] is None
    assert {"search", "train"} <= set(found.seconds) and not (out / "report").exists()


def test_a_baseline_that_cannot_be_trained_is_left_out_with_the_reason(
    folder: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any, **settings: Any) -> Any:
        raise TrainingError("all labels are alike")

    monkeypatch.setattr(baselines, "train_polar_arm", never)
    monkeypatch.setattr(reproduce, "TASKS", ("addition", "subtraction"))
    run(job_of(folder, tmp_path / "out"))
    tables = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    told = "Left out, because it could not be trained: PoLar network (all labels are alike)."
    assert told in tables and "PoLar network, first of beam" not in tables
    assert "per-layer router" in tables


def test_each_part_divides_all_compute_threads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tasks=("addition",), count=2, split="train")
    questions, shares = asked.questions(), []

    def part(job: Any, console: Any) -> None:
        opened = open_job(
            job.workplace,
            questions,
            templates=asked.templates(questions),
            console=console,
            workers=job.workers,
        )
        shares.append(opened.place.workplace.threads)
        raise InputError("enough")

    for module in (search, train, evaluate):
        monkeypatch.setattr(module, "run", part)
    made = Stages(
        out=tmp_path,
        asked=asked,
        size=PRESETS["quick"],
        workplace=Workplace(model=str(folder), backend="eager"),
        workers=2,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for stage in (made.find_programs, made.learn, made.test):
            with pytest.raises(InputError, match="enough"):
                stage(silent_console())
        assert shares == [2, 2, 2] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_machine_is_measured_on_train_questions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By searches of the model as it is, whose questions are none of the test."""
    searched: list[Question] = []
    search_run = search.run

    def run(job: search.SearchJob, *more: Any) -> search.SearchResult:
        searched.extend(job.asked.questions())
        return search_run(job, *more)

    monkeypatch.setattr(search, "run", run)
    monkeypatch.setattr(stages, "_MOST_PROBES", 1)  # nothing is compiled
    monkeypatch.setattr(reproduce, "TASKS", ("addition",))
    for job in (job_of(folder, tmp_path / "out"), paper(folder, tmp_path / "out")):
        with pytest.raises(InputError, match="too small: the smallest reproduction of this model"):
            plan(replace(job, budget=1e-4))
    assert {own_split(question) for question in searched} == {"train"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--budget", "0"], "a budget of 0 hours"),
        (["--budget", "nan"], "a budget of nan hours"),
        (["--protocol", "paper"], "has no questions of its own"),
        (["--data", "x.jsonl"], "are for the protocol 'paper'"),
        (["--leave-out", "x.txt"], "are for the protocol 'paper'"),
        (["--protocol", "paper", "--data", "none.jsonl"], "cannot read questions"),
        (["--protocol", "paper", "--data", "{folder}/plain.jsonl"], "line 1: its tier is None"),
        (["somewhere", "--model", "elsewhere"], "two models are named"),
        (["/nowhere/x"], "there is no folder /nowhere/x"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_loaded(
    given: list[str],
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Workplace, "load", lambda self: pytest.fail("a model is loaded"))
    (folder / "plain.jsonl").write_text('{"question": "1 + 1", "answer": 2}\n')
    given = [text.format(folder=folder) for text in given]
    assert main(["reproduce", *given, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "search.jsonl").write_text("")
    with pytest.raises(InputError, match="it is no reproduction"):
        run(job_of(folder, tmp_path))
    with pytest.raises(InputError, match="search.jsonl is no folder"):
        run(job_of(folder, tmp_path / "search.jsonl"))
