"""What an evaluation writes: each number of a report on four questions, by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from evaluation_samples import (
    CHANCES,
    DEPTH,
    IDENTITY,
    LONG,
    MENU,
    QUESTIONS,
    RECORDS,
    RIGHT,
    SHORT,
)
from polar_fx.evaluation import report
from polar_fx.evaluation.choices import BEST_STATIC, SELECTOR_ACCURACY, Choice, arm_results, static
from polar_fx.stats.arms import IDENTITY as IDENTITY_ARM
from polar_fx.stats.arms import ArmResult

CHOSEN = Choice.single(SELECTOR_ACCURACY, [SHORT, SHORT, LONG, LONG])
ARMS = arm_results(
    [static(IDENTITY_ARM, IDENTITY, n=4), CHOSEN, static(BEST_STATIC, SHORT, n=4)], RECORDS
)


def test_calibration_by_hand() -> None:
    chances, right = np.array([[0.9, 0.2], [0.6, 0.2]]), np.array([[True, False], [False, False]])
    found = report.calibration_report(chances, right)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.04) / 4)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.8]).mean())
    # a bin for each value: |0.9 - 1| + |0.6 - 0| + 2 |0.2 - 0|, over 4
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.4) / 4)
    json.dumps(found)


def test_questions_of_known_and_of_other_tasks() -> None:
    assert report.distributions(QUESTIONS, {"add"}) == {
        "in distribution": [0, 1],
        "out of distribution": [2, 3],
    }
    assert report.distributions(QUESTIONS[2:], {"add"}) == {"out of distribution": [0, 1]}
    assert report.distributions([], {"add"}) == {}


def test_difficulty_by_hand() -> None:
    easy = {"arm": SELECTOR_ACCURACY, "difficulty": 1, "n": 2}
    # a1 and m1 are of level 1, a2 of 2, and of m2 nothing is known
    assert report.by_difficulty(CHOSEN, RECORDS) == [
        {**easy, "difficulty": None, "n": 1, "identity": 1.0, "accuracy": 1.0, "steps": 7.0},
        {**easy, "identity": 0.5, "accuracy": 1.0, "steps": 5.5},
        {**easy, "difficulty": 2, "n": 1, "identity": 0.0, "accuracy": 1.0, "steps": 4.0},
    ]


def test_a_selector_report_by_hand() -> None:
    found = report.selector_report(
        [CHOSEN, static("all", SHORT, n=4)], RECORDS, chances=CHANCES, right=RIGHT
    )
    assert found["questions"] == 4
    assert found["programs_used"] == [
        {"program": str(SHORT), "steps": 4, "share": 0.5},
        {"program": str(LONG), "steps": 7, "share": 0.5},
    ]
    assert [row["arm"] for row in found["difficulty"]] == [SELECTOR_ACCURACY] * 3 + ["all"] * 3
    assert found["calibration"]["brier"] == pytest.approx(((CHANCES - RIGHT) ** 2).mean())


def test_one_method_against_another_by_task_and_over_all() -> None:
    found = report.against(ARMS, SELECTOR_ACCURACY, other=BEST_STATIC)
    assert [(row["task"], row["n"]) for row in found] == [("overall", 4), ("add", 2), ("mul", 2)]
    overall, add, mul = found
    assert {row["arm"] for row in found} == {SELECTOR_ACCURACY}
    assert {row["against"] for row in found} == {BEST_STATIC}
    # both are right on add; on mul, the long program is right twice and the short one never
    assert (add["gained"], add["lost"]) == (0, 0) and (mul["gained"], mul["lost"]) == (2, 0)
    assert (overall["gained"], overall["lost"]) == (2, 0)
    assert overall["gain"]["value"] == pytest.approx(50.0)


def test_a_report_has_every_arm_beside_the_identity(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    facts = {"questions": np.int64(4), "threshold": np.float64(0.5), "folder": Path("x")}
    written = report.write_report(folder, ARMS, results=facts, diagrams={}, figures=False)
    assert [path.name for path in written] == ["results.json", "arms.md", "arms.csv"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["questions"], results["threshold"], results["folder"]) == (4, 0.5, "x")
    arms = {(row["arm"], row["task"]): row for row in results["arms"]}
    assert len(arms) == len(results["arms"]) == 3 * 3
    mine = arms[SELECTOR_ACCURACY, "mul"]
    assert (mine["gained"], mine["lost"], mine["oracle"], mine["out_of_distribution"]) == (
        1,
        0,
        False,
        False,
    )
    assert mine["unique_layers"] == DEPTH and mine["generated_tokens"] is None
    assert mine["adjusted_p"] >= arms[BEST_STATIC, "mul"]["p_value"] / 2
    assert arms[IDENTITY_ARM, "mul"]["adjusted_p"] is None
    rows = list(csv.DictReader((folder / "arms.csv").read_text().splitlines()))
    assert len(rows) == 9


def test_oracles_are_marked(tmp_path: Path) -> None:
    choice = Choice("any", (MENU.programs,) * 4, True)
    arms: list[ArmResult] = [*ARMS, *arm_results([choice], RECORDS)]
    report.write_report(tmp_path, arms, results={}, diagrams={}, figures=False)
    rows = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert {row["arm"] for row in rows if row["oracle"]} == {"any (oracle)"}
    assert "any (oracle)" in (tmp_path / "arms.md").read_text()


def test_figures_are_written_with_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = report.write_report(tmp_path, ARMS, results={}, diagrams={})
    assert {path.suffix for path in written} == {".json", ".md", ".csv", ".svg", ".png"}
    assert all(path.stat().st_size for path in written)
