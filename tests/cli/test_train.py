"""`train` and `evaluate`: from records to a predictor to a report, each gone on with, on a tiny
model.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polar_fx.cli import main, read_options
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, load_jsonl, split_of
from polar_fx.search.records.record_file import RecordReader
from tiny_search import save_tiny, save_tiny_encoder

DEPTH = 6
WRONG = Verdict(False, -4.0, -1.0)
RIGHT = [Program.parse(text, DEPTH) for text in ("0-5", "skip 3", "skip 4-5", "repeat 2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("model"))
    # the letter tells which program answers
    rows = [
        {"id": f"r{i}", "task": "odd", "question": f"{chr(65 + i % 4) * 3}{i}", "answer": str(i)}
        for i in range(240)
    ]
    # longer than any that is asked later, which must not keep it from training the baselines
    longest = next(r for r in rows if split_of(r["id"]) == "train")
    longest["question"] += "?" * 80
    (made / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    others = [{**r, "id": f"s{i}", "task": f"new {i % 2}"} for i, r in enumerate(rows[100:130])]
    for name, asked in (("mixed", rows + others), ("new", others)):
        (made / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in asked if r is not longest)
        )
    save_tiny_encoder(made / "encoder")
    return made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Random weights answer nothing, so what is right is said here; everything else is as it is.

    Counts evaluations.
    """
    counted = [0]

    def evaluate(self: Any, pairs: Sequence[tuple[EncodedQuestion, Program]]) -> list[Verdict]:
        counted[0] += len(pairs)
        found = [p == RIGHT[int(q.id[1:]) % 4] for q, p in pairs]
        return [Verdict(right, -0.1 if right else -4.0, 1.0 if right else -1.0) for right in found]

    monkeypatch.setattr(TeacherForcing, "evaluate", evaluate)
    return counted


def arguments(folder: Path, rows: str = "rows") -> list[str]:
    return [
        "--model",
        str(folder),
        "--backend",
        "eager",
        "--data",
        str(folder / f"{rows}.jsonl"),
        "--prompt",
        "plain",
    ]


def train_arguments(folder: Path, records: Path, out: Path, *more: str) -> list[str]:
    sizes = [
        "--menu",
        "6",
        "--candidates",
        "12",
        "--variations",
        "4",
        "--screen-questions",
        "24",
        "--after-steps",
        "2",
    ]
    sizes += ["--edits", "12", "--finalists", "8", "--final-questions", "16"]
    return ["train", str(records), *arguments(folder), *sizes, "--out", str(out), *more]


@pytest.fixture
def records(folder: Path, tmp_path: Path, world: list[int]) -> Path:
    search = [
        "search",
        *arguments(folder),
        "--simulations",
        "60",
        "--questions",
        "24",
        "--method",
        "scan",
    ]
    assert main([*search, "--out", str(tmp_path / "run.jsonl"), "--set", "max_extra=1"]) == 0
    return tmp_path / "run.jsonl"


@pytest.mark.slow
def test_from_records_to_a_report(
    folder: Path,
    records: Path,
    tmp_path: Path,
    world: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, report = tmp_path / "predictor", tmp_path / "report"
    capsys.readouterr()
    assert main(train_arguments(folder, records, out, "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    splits = [split_of(q.id) for q in load_jsonl(folder / "rows.jsonl")]
    assert results["questions"] == {
        "train": splits.count("train"),
        "validation": splits.count("validation"),
        "screened": 40,
    }
    menu = {row["program"] for row in results["menu"]}
    assert set(map(str, RIGHT)) <= menu and len(results["menu"]) <= 6
    assert results == json.loads((out / "results.json").read_text())
    assert (
        results["validation"]["likeliest"]["accuracy"]
        > results["validation"]["best_static_of_train"]["accuracy"]
    )
    asked = world[0]
    assert main(train_arguments(folder, records, out)) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    assert f"polar_fx evaluate {out} --out {report} --data {folder}" in hint
    assert read_options(hint.split()[3:]).out == report
    again = json.loads((out / "results.json").read_text())
    assert world[0] == asked, "nothing is asked twice"
    for name in ("menu", "validation", "training", "threshold"):
        assert again[name] == results[name]

    _check_report(folder, out, records=records, report=report, world=world, capsys=capsys)
    _check_tasks_not_trained_on(folder, out, tmp_path=tmp_path, capsys=capsys)


def _check_report(
    folder: Path,
    out: Path,
    *,
    records: Path,
    report: Path,
    world: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An evaluation of test questions alone, and a second one that asks nothing again."""
    splits = [split_of(q.id) for q in load_jsonl(folder / "rows.jsonl")]
    evaluate = ["evaluate", str(out), *arguments(folder), "--records", str(records)]
    evaluate += ["--answers", "6", "--out", str(report)]
    assert main([*evaluate, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    mined = {r.question.id for r in RecordReader(records)}
    asked_ids = {r.question.id for r in RecordReader(report / "verdicts.jsonl")}
    assert asked_ids == {
        f"r{i}" for i, s in enumerate(splits) if s == "test" and f"r{i}" not in mined
    }
    assert told["questions"] == len(asked_ids)
    arms = {row["arm"]: row for row in json.loads((report / "results.json").read_text())["arms"]}
    share = sum(int(name[1:]) % 4 == 0 for name in asked_ids) / len(asked_ids)
    right = {name: row["gain"]["value"] / 100 + share for name, row in arms.items()}
    assert right["identity"] == pytest.approx(share) and right[
        "any program of the menu (oracle)"
    ] == pytest.approx(1.0)
    assert right["selector: likeliest"] > right["best static program"] + 0.1
    names = {
        "per-layer router (DR.LLM-style)",
        "PoLar network, first of beam",
        "block-influence pruning, 5 steps",
    }
    assert names <= set(arms) and told["generated"]["n"] == 6 and told["out_of_distribution"] == []
    files = {p.name for p in report.iterdir()}
    assert {
        "results.json",
        "arms.md",
        "arms.csv",
        "pareto.svg",
        "gains.png",
        "reliability.svg",
        "verdicts.jsonl",
        "report.html",
    } <= files
    page = (report / "report.html").read_text(encoding="utf-8")
    shown = json.loads(re.findall(r'json">(.*?)</script>', page, re.DOTALL)[0])
    of_page = {policy["policy"]: policy["accuracy"] for policy in shown["policies"]}
    assert of_page["identity"] == pytest.approx(share)
    assert of_page["accuracy"] == pytest.approx(right["selector: accuracy"])
    assert sum(bool(row["answers"]) for row in shown["questions"]) == 6
    assert "vote of 3 programs" in (report / "answers" / "arms.md").read_text()
    asked = world[0]
    assert main([*evaluate, "--json", "--no-figures"]) == 0
    assert world[0] == asked, "the report is made of what is there"
    other = ["evaluate", str(out), *arguments(folder), "--dtype", "bfloat16"]
    assert main([*other, "--out", str(report)]) == 2
    assert " in float32, of fingerprint" in capsys.readouterr().err


def _check_tasks_not_trained_on(
    folder: Path, out: Path, *, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are pooled apart from the others, alone or beside them."""
    shown = {}
    for name, more in (
        ("mixed", ["--no-baselines", "--no-figures"]),
        ("new", ["--encoder", str(folder / "encoder"), "--no-figures"]),
    ):
        report = tmp_path / name
        asked = [
            "evaluate",
            str(out),
            *arguments(folder, name),
            "--answers",
            "0",
            "--out",
            str(report),
            "--json",
            *more,
        ]
        assert main(asked) == 0, capsys.readouterr().err
        shown[name] = json.loads(capsys.readouterr().out)
        assert shown[name]["out_of_distribution"] == ["new 0", "new 1"]
        rows = json.loads((report / "results.json").read_text())["arms"]
        identity = {
            row["task"]: (row["n"], row["out_of_distribution"])
            for row in rows
            if row["arm"] == "identity"
        }
        trained = {"odd": (shown[name]["tasks"]["odd"], False)} if name == "mixed" else {}
        assert identity == {
            "out of distribution": (30, True),
            **trained,
            "new 0": (15, True),
            "new 1": (15, True),
        }
        assert "| new 0 (out of distribution) | identity | 15 |" in (report / "arms.md").read_text()
    assert {k: v["questions"] for k, v in shown["new"]["distributions"].items()} == {
        "out of distribution": 30
    }
    assert sorted(shown["mixed"]["distributions"]) == ["in distribution", "out of distribution"]
    assert [row["task"] for row in shown["new"]["against_static"]] == [
        "out of distribution",
        "new 0",
        "new 1",
    ]
    assert "PoLar network on a text encoder, first of beam" in {row["arm"] for row in rows}
    assert len(shown["new"]["baselines"]["PoLar network on a text encoder"]["encoder"]) == 64
    assert (
        main([*asked, "--no-baselines"]) == 2
        and "for one of the baselines, which are left out" in capsys.readouterr().err
    )


def test_one_command_from_questions_to_a_tested_predictor(
    folder: Path,
    tmp_path: Path,
    world: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "fit"
    fit = ["fit", *arguments(folder), "--out", str(out)]
    assert main(fit) == 0
    said, told = capsys.readouterr()
    assert "programs are run on questions, about" in told and "are left" in told
    assert "policy accuracy: " in said and "Verdict: " in said
    splits = {q.id: split_of(q.id) for q in load_jsonl(folder / "rows.jsonl")}
    searched = [splits[r.question.id] for r in RecordReader(out / "search.jsonl")]
    assert searched == ["train"] * 40
    tested = {splits[r.question.id] for r in RecordReader(out / "report" / "verdicts.jsonl")}
    assert tested == {"test"}
    hint = said.splitlines()[-1]
    run = f"python -m polar_fx run --predictor {out / 'predictor'}"
    assert hint == f"{run} --raw --prompt ... --model {folder}"
    asked = world[0]
    assert main([*fit, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert world[0] == asked, "nothing is asked twice"
    assert again["conclusion"] in said
    monkeypatch.setattr(TeacherForcing, "evaluate", lambda self, pairs: [WRONG] * len(pairs))
    assert main(["fit", *arguments(folder), "--out", str(tmp_path / "wrong")]) == 2
    assert "no program answers any of the 40 questions" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "a", "answer": "b", "split": "train"}\n')
    nothing = ["fit", "--data", str(few), "--out", str(tmp_path / "none")]
    assert main(nothing) == 2
    assert "1 of the questions are for train, and at least 2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_refusals(
    folder: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictor"
    assert main(train_arguments(folder, records, out, "--dtype", "bfloat16")) == 2
    assert "name that model and dtype" in capsys.readouterr().err
    assert main(train_arguments(folder, records, out, "--policy", "fastest")) == 2
    assert "none of identity" in capsys.readouterr().err
    assert main(train_arguments(folder, records, out, "--budget", "1.5")) == 2
    assert "between 0 and 1" in capsys.readouterr().err
    assert main(train_arguments(folder, records, out, "--prompt", "direct")) == 2
    told = capsys.readouterr().err
    assert (
        "records of odd in the prompt plain@1, but direct@1" in told
        and "train with the prompt plain, or search with" in told
    )
    assert main(["train", str(records), "--model", str(folder), "--out", str(out)]) == 2
    assert "of no built-in task" in capsys.readouterr().err
    assert main(["evaluate", str(out), *arguments(folder), "--out", str(tmp_path / "r")]) == 2
    assert "holds no predictor" in capsys.readouterr().err
    assert not out.exists() or not (out / "predictor.json").exists()


def test_labels_that_say_nothing_are_refused(
    folder: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        TeacherForcing, "evaluate", lambda self, pairs: [Verdict(False, -4.0, -1.0) for _ in pairs]
    )
    assert main(train_arguments(folder, records, tmp_path / "p", "--questions", "30")) == 2
    assert "every program is wrong on all 30 train questions" in capsys.readouterr().err
    assert not (tmp_path / "p" / "predictor.json").exists()
