"""What is said of search records, against numbers found by hand and against slower ways to find
them.
"""

import json
import math

import pytest

from polar_fx.errors import InputError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.search.analysis.edit_effects import EditEffect, edit_effects
from polar_fx.search.analysis.summary import (
    group_summaries,
    is_repeat_only,
    is_skip_only,
    summary,
)
from polar_fx.search.records.records import SearchRecord
from search_samples import (
    DAMPED,
    DEPTH,
    IDENTITY,
    MIXED,
    MOVED,
    REPEAT,
    SAMPLES,
    SKIP,
    SKIP_TWO,
    record,
)
from shares import share


def test_kinds_of_programs() -> None:
    kinds = {
        p: (is_skip_only(p), is_repeat_only(p))
        for p in (IDENTITY, SKIP, SKIP_TWO, REPEAT, DAMPED, MIXED, MOVED)
    }
    assert [p for p, (skip, _) in kinds.items() if skip] == [SKIP, SKIP_TWO]
    assert [p for p, (_, repeat) in kinds.items() if repeat] == [REPEAT, DAMPED]
    assert not is_skip_only(Program.parse("0 [1-2]@0.5 3-4 /6")) and not is_repeat_only(
        Program.from_path([1, 0, 2, 3, 4, 5], 6)
    )


def test_summary_against_hand_computed_numbers() -> None:
    found = summary(SAMPLES)
    assert found["questions"] == 6 and found["depth"] == DEPTH
    assert found["accuracy"] == {
        "baseline": share(1, 6),
        "skip_only": share(2, 6),
        "repeat_only": share(3, 6),
        "both": share(4, 6),
    }
    assert found["shorter"] == {
        "right": share(1, 1),
        "wrong": share(1, 5),
        "corrected": share(3, 5),
    }
    assert found["shortest_steps"] == {"mean": pytest.approx((5 + 7 + 4 + 8) / 4), "n": 4}
    assert (found["explored"], found["valid"]) == (pytest.approx(8 / 6), pytest.approx(4 / 6))
    assert (found["evaluations"], found["seconds"], found["evaluations_per_second"]) == (9, 4, 2.25)
    steps = [[4, 1], [5, 1], [7, 1], [8, 1]]
    assert found["steps"] == {"valid": steps, "shortest": steps}
    assert found["edits"] == {
        "programs": 4,
        "not_segmentable": 0,
        "skip": [[1, 1], [2, 1]],
        "repeat": [[1, 1], [2, 1]],
        "times": [[2, 2]],
    }
    assert found["verification"] == {
        "programs": 4,
        "questions": 3,
        "flipped": share(2, 4),
        "identity_flipped": share(1, 1),
        "corrected_confirmed": share(1, 2),
    }
    # Ranks of the gains 1, -1, -2, .25, 2, 1.5 are 4, 2, 1, 3, 6, 5; of the changes 1, 0, -1, 0, 1,
    # 1: 5, 2.5, 1, 2.5, 5, 5.
    assert found["likelihood"] == {
        "pairs": 6,
        "questions": 3,
        "pooled": pytest.approx(15 / math.sqrt(17.5 * 15)),
        "mean": pytest.approx(1),
        "n_mean": 2,
    }
    assert json.loads(json.dumps(found)) == found


def test_summary_of_nothing() -> None:
    found = summary([])
    assert found["accuracy"]["both"] == share(0, 0) and found["shortest_steps"] == {
        "mean": None,
        "n": 0,
    }
    assert all(
        found[name] is None
        for name in ("depth", "explored", "evaluations_per_second", "verification", "likelihood")
    )


def test_summary_leaves_its_records_alone_and_takes_an_iterator() -> None:
    assert summary(iter(SAMPLES)) == summary(SAMPLES) == summary(SAMPLES[::-1])


def test_summary_of_two_depths_is_refused() -> None:
    other = SearchRecord(SAMPLES[0].question, 3, Verdict(True), ())
    with pytest.raises(InputError, match="3 and 6 layers"):
        summary([SAMPLES[0], other])


def test_scores_without_a_number_are_left_out() -> None:
    verdicts = {
        SKIP: Verdict(False, math.nan),
        REPEAT: Verdict(False, -math.inf),
        MIXED: Verdict(True, -1.0),
    }
    found = summary(
        [
            record("a", Verdict(False, -2.0), explored=verdicts),
            record("b", Verdict(False, math.nan), explored=verdicts),
        ]
    )
    assert found["likelihood"] == {"pairs": 2, "questions": 1, "pooled": 1, "mean": 1, "n_mean": 1}
    assert [
        e.n_log_likelihood
        for e in edit_effects([record("a", Verdict(False, -2.0), explored=verdicts)])
    ] == [0, 0]


def test_groups() -> None:
    groups = group_summaries(SAMPLES)
    assert [(g["task"], g["difficulty"], g["cell"], g["summary"]["questions"]) for g in groups] == [
        ("add", None, None, 3),
        ("add", 1, None, 2),
        ("add", 2, None, 1),
        ("add", None, "a", 2),
        ("add", None, "b", 1),
        ("mul", None, None, 3),
    ]
    assert groups[3]["summary"] == summary([SAMPLES[0], SAMPLES[2]])


def test_effects_of_single_edits() -> None:
    assert edit_effects(SAMPLES) == [
        # right once more and once less; +1 and -2 nats
        EditEffect("skip", 2, 1, 1, 1.0, 2, 0.0, 2, -0.5),
        EditEffect("skip", 0, 2, 1, 1.0, 1, 0.0, 0, None),
        EditEffect("repeat", 3, 1, 2, 1.0, 2, 0.0, 2, -0.375),
        EditEffect("repeat", 0, 2, 2, 0.5, 1, 1.0, 0, None),
    ]
