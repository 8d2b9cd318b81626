"""Arms: kept as JSON, pooled, compared by task and together."""

import csv
import io
import json
from typing import Any

import numpy as np
import pytest

from paired_samples import arm, pairs
from polar_fx.errors import InputError
from polar_fx.stats.arms import IDENTITY, OVERALL, SEEN, UNSEEN, ArmResult, compare_arms, pool
from polar_fx.stats.paired import (
    Estimate,
)
from polar_fx.stats.tables import NOTE, UNSEEN_NOTE, csv_text, markdown


def test_an_arm_survives_json() -> None:
    first = arm(
        "menu",
        format_valid=np.arange(20) > 0,
        generated_tokens=np.arange(20),
        unique_layers=24,
        oracle=True,
    )
    again = ArmResult.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again.to_dict() == first.to_dict() and again.n == 20 and again.oracle
    assert (
        again.right.dtype == bool
        and again.unique_layers is not None
        and again.unique_layers.shape == (20,)
    )
    assert (
        pool([first, arm("menu", "sequences", oracle=True)]).to_dict()["strata"]
        == ["addition"] * 20 + ["sequences"] * 20
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 3}, "says n = 3 and has 20"),
        ({"color": 1}, "unknown fields of an arm: color"),
        ({"steps": None}, "lacks steps"),
        ({"name": ""}, "arm named ''"),
        ({"oracle": 1}, "oracle is 1"),
        ({"format_valid": [True]}, "format_valid has 1 values"),
    ],
)
def test_from_dict_refuses(change: dict[str, Any], words: str) -> None:
    values = {
        name: value
        for name, value in {**arm("menu").to_dict(), **change}.items()
        if name != "steps" or value is not None
    }
    with pytest.raises(InputError, match=words):
        ArmResult.from_dict(values)


def test_arrays_of_an_arm_are_its_own() -> None:
    right, identity = pairs(1, 1, both=1, neither=1)
    made = ArmResult("menu", "addition", right, identity, np.ones(4), np.ones(4))
    right[0] = False
    assert made.right[0]
    with pytest.raises(ValueError, match="read-only"):
        made.right[0] = False


def test_arms_are_compared_by_task_and_together() -> None:
    results = [
        arm(IDENTITY, cells=(0, 0, 12, 8)),
        arm("menu"),
        arm("random", cells=(2, 6, 6, 6)),
        arm("best", oracle=True),
    ]
    results += [
        arm(IDENTITY, "sequences", cells=(0, 0, 5, 5)),
        arm("menu", "sequences", cells=(5, 0, 5, 0)),
    ]
    rows = compare_arms(results, resamples=100)
    assert [(row.arm.task, row.arm.name) for row in rows[:2]] == [
        (OVERALL, IDENTITY),
        (OVERALL, "menu"),
    ]
    assert len(rows) == 8  # random and best did not run the second task
    menu = rows[1]
    assert (menu.paired.n, menu.paired.gained, menu.paired.lost) == (30, 11, 2)
    assert menu.arm.strata == ("addition",) * 20 + ("sequences",) * 10
    here = {row.arm.name: row for row in rows if row.arm.task == "addition"}
    assert (
        here[IDENTITY].adjusted_p is None
        and here["best"].adjusted_p is None
        and here["best"].label == "best (oracle)"
    )
    assert here["menu"].adjusted_p == pytest.approx(2 * 74 / 256)  # of two candidates
    assert here["menu"].paired.step_ratio == Estimate(0.8, 0.8, 0.8)


def test_tasks_not_trained_on_are_pooled_apart() -> None:
    tasks = {"addition": False, "sequences": False, "division": True, "words": True, "svamp": True}
    results = [
        arm(name, task, unseen=unseen)
        for task, unseen in tasks.items()
        for name in (IDENTITY, "menu")
    ]
    rows = compare_arms(results, resamples=50)
    menu = {row.arm.task: row for row in rows if row.arm.name == "menu"}
    assert list(menu) == [SEEN, UNSEEN, *tasks] and [
        menu[name].paired.n for name in (SEEN, UNSEEN)
    ] == [40, 60]
    assert menu[UNSEEN].arm.strata == ("division",) * 20 + ("words",) * 20 + ("svamp",) * 20
    labels = [
        SEEN,
        UNSEEN,
        "addition",
        "sequences",
        *(f"{task} ({UNSEEN})" for task in ("division", "words", "svamp")),
    ]
    assert [row.task_label for row in menu.values()] == labels
    assert [
        row["out_of_distribution"]
        for row in csv.DictReader(io.StringIO(csv_text(list(menu.values()))))
    ] == list("0100111")
    assert markdown(rows).splitlines()[
        -1
    ] == f"{NOTE} {UNSEEN_NOTE}" and UNSEEN_NOTE not in markdown([menu["addition"]])
    alone = compare_arms(
        [each for each in results if each.task in ("addition", "division")], resamples=50
    )
    assert [row.arm.task for row in alone] == ["addition", "addition", "division", "division"], (
        "one of a kind is not pooled"
    )
    assert ArmResult.from_dict(json.loads(json.dumps(menu[UNSEEN].arm.to_dict()))).unseen
    with pytest.raises(InputError, match=f"a task is named {UNSEEN}"):
        compare_arms([*results, arm("menu", UNSEEN, unseen=True)])


def test_arms_on_other_questions_are_refused() -> None:
    with pytest.raises(InputError, match="random and menu on addition differ in the identity"):
        compare_arms([arm("menu"), arm("random", cells=(6, 3, 10, 1))])
    with pytest.raises(InputError, match="differ in the identity"):
        compare_arms([arm("menu"), arm("random", identity_steps=29)])
    with pytest.raises(InputError, match="two results of menu"):
        compare_arms([arm("menu"), arm("menu")])
    with pytest.raises(InputError, match="task is named overall"):
        compare_arms([arm("menu"), arm("menu", OVERALL)])
    with pytest.raises(InputError, match="pooled arms"):
        pool([arm("menu"), arm("random", "sequences")])
