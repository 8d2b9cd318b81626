"""The command `exits`: from questions with choices to a tested exit, also after an interruption."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polar_fx.cli import main
from polar_fx.cli.exits import told
from polar_fx.errors import InputError
from polar_fx.jobs import exits
from polar_fx.jobs.questions import Asked
from polar_fx.judge.early_exit import EarlyExits
from polar_fx.search.workers import Workplace
from tiny_search import save_tiny

SPLITS = ("train", "train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("model"), depth=8)
    rows = map(_row, range(80))
    (made / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return made


def _row(i: int) -> dict[str, Any]:
    return {
        "id": f"c{i}",
        "task": ("mine", "yours")[i % 2],
        "question": f"{i * 7}?",
        "choices": [f"{chr(97 + i % 26)}{k}" for k in range(2 + i % 2)],
        "answer": i % 2,
        "split": SPLITS[i // 2 % 4],
    }


def job(folder: Path, out: Path) -> exits.ExitsJob:
    place = Workplace(model=str(folder), backend="eager")
    return exits.ExitsJob(
        out=out,
        asked=Asked(data=(folder / "rows.jsonl",)),
        budget=0.5,
        risk=0.3,
        loss=0.3,
        workplace=place,
    )


def test_from_questions_to_a_tested_exit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["exits", "--model", str(folder), "--backend", "eager", "--budget", "0.5"]
    asked += ["--data", str(folder / "rows.jsonl"), "--out", str(tmp_path / "out")]
    asked += ["--risk", "0.3", "--loss", "0.3"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["overall", "mine", "yours"]
    assert "n = 20" in lines[0] and "n = 10" in lines[1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = EarlyExits.load(results["path"])
    assert set(found.tasks) == {"mine", "yours"} and found.notes["learned_from"] == 60
    assert found.notes["budget"] == 0.5 and found.notes["model_name"] == folder.name
    for row in results["arms"]:
        assert row["n"] == (20 if row["task"] == "overall" else 10)
        assert row["step_ratio"]["value"] <= 1
    assert (tmp_path / "out" / "arms.md").exists()


def test_a_job_that_was_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    whole = exits.run(job(folder, tmp_path / "whole"))
    (scores,) = (tmp_path / "whole").glob("scores-*.jsonl")
    lines = scores.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / scores.name).write_text("".join(lines[:33]) + lines[33][:20])
    again = exits.run(job(folder, cut))
    assert again.exits == whole.exits
    kept = (cut / scores.name).read_text().splitlines()
    assert len(kept) == 80 + 1, "the broken line stays, and no question is scored twice"


def test_questions_without_choices_are_refused(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    wrong = exits.ExitsJob(out=tmp_path / "out", asked=Asked(data=(data,)))
    with pytest.raises(InputError, match="has no choices; early exits compare"):
        exits.run(wrong)
    for settings in ({"budget": 1.5}, {"risk": -1.0}, {"loss": 2.0}):
        with pytest.raises(InputError, match="task 'mine': (budget is 1.5|risk is -1|loss is 2)"):
            exits.run(replace(job(folder, tmp_path / "out"), **settings))
    with pytest.raises(InputError, match="task 'mine': 30 questions to learn from, and 874 are"):
        exits.run(replace(job(folder, tmp_path / "out"), risk=0.03, loss=0.01))
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_an_exit_that_is_refused_is_told_with_the_reason(folder: Path, tmp_path: Path) -> None:
    """So few may leave that no more than chance can be seen."""
    found = exits.run(replace(job(folder, tmp_path / "out"), budget=0.95))
    assert all(rule.never and rule.refused for rule in found.exits.tasks.values())
    lines = told(found)
    assert lines[0] == f"mine: {found.exits.tasks['mine'].refused}"
    assert [line.split(":")[0].split(",")[0] for line in lines] == ["mine", "yours", "overall"]
    assert "at 100.0 % of the steps" in lines[2]
    assert EarlyExits.load(found.path) == found.exits
    (whole, early) = [row for row in found.compared if row.arm.task == "mine"]
    assert (whole.arm.right == early.arm.right).all()


def test_a_choice_that_cannot_be_stays_json() -> None:
    scores = [-1.5, -math.inf]
    written = json.dumps(exits._to_json(scores), allow_nan=False)
    assert exits._from_json(json.loads(written)) == scores
