"""Mining: candidates, finalists, variations and menus, by hand."""

from dataclasses import replace

import pytest

from polar_fx.errors import InputError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.runtime.trunk import shares_trunk
from polar_fx.training.mining import (
    best_static,
    candidates,
    edits_as_programs,
    finalists,
    mine,
    variations,
)
from training_samples import DEPTH, IDENTITY, A, B, C, D, record, table


def test_candidates_are_valid_share_the_trunk_and_were_not_overturned() -> None:
    records = [
        record("a", False, right={A: True, B: False, D: True}),
        record("b", True, right={A: True, C: True}, verified={C: Verdict(False)}),
        record("c", True, right={B: True}),
    ]
    assert set(candidates(records, 1, count=10)) == {A, B}, (
        "D skips the trunk, C was found wrong again"
    )
    assert set(candidates(records, 0, count=10)) == {A, B, D}
    assert candidates(records, 1, count=1) == [A]
    found = edits_as_programs(DEPTH, 3)
    assert all(shares_trunk(p, 3) for p in found) and len(set(found)) == len(found)
    assert {A, B, C, Program.parse("repeat 5-6 @0.5", DEPTH)} <= set(found) and D not in found
    assert Program.parse("skip 4-9", 30) in edits_as_programs(30, 4), "some long ones"


def test_finalists_are_the_best_of_each_task_and_within_each_budget() -> None:
    # A is best on one task, C on the other; B is the best of few steps; the fourth is good for
    # nothing
    other = Program.parse("repeat 4", DEPTH)
    made = table([(False, {A: i < 6, B: i % 6 == 0, C: i >= 6, other: False}) for i in range(12)])
    questions = tuple(
        replace(q, task="one" if i < 6 else "two") for i, q in enumerate(made.questions)
    )
    tasks = replace(made, questions=questions)
    assert (
        finalists(tasks, 3) == [A, C, B]
        and IDENTITY not in finalists(tasks, 9)
        and finalists(tasks, 9)[-1] == other
    )
    more = replace(made, questions=tuple(replace(q, id=f"m{q.id}") for q in questions))
    joined = made.choose([B]).above(more)
    assert joined.programs == (IDENTITY, B) and len(joined.questions) == 24
    assert joined.right[12:].tolist() == joined.right[:12].tolist()
    with pytest.raises(InputError, match="'q0' is in both"):
        made.above(made)
    with pytest.raises(InputError, match="lacks program 0-2 4-7"):
        made.above(more.choose([B]))


def test_mining_takes_what_adds_most() -> None:
    # A answers all of one kind, B one question more than C, and C what B answers
    rows = [(False, {A: i < 6, B: 6 <= i < 10, C: 7 <= i < 10}) for i in range(12)]
    made = table(rows, ["x"] * 6 + ["y"] * 6)
    assert mine(made, 3) == [IDENTITY, A, B]
    assert mine(made, 2) == [IDENTITY, A] and mine(made, 4)[:3] == [IDENTITY, A, B]
    assert best_static(made) == A and best_static(made, 6) == B and best_static(made, 1) == IDENTITY
    # three of four right in the small group look better than 40 of 60 on its whole task; they are
    # not taken for that
    small = [(False, {A: i % 3 < 2, B: i < 4 and i != 1}) for i in range(64)]
    assert mine(table(small, ["x"] * 4 + ["y"] * 60), 2) == [IDENTITY, A]
    cheaper = table([(True, {A: True, B: True}) for _ in range(4)])
    assert mine(cheaper, 2) == [IDENTITY, B], "as right, in fewer steps"


def test_variations_join_what_touches_different_layers() -> None:
    rows = [(False, {A: True, B: True, C: True}) for _ in range(3)]
    found = variations(table(rows), 1, count=20)
    assert (
        Program.parse("skip 3-5", DEPTH) in found
        and Program.parse("skip 3, repeat 6", DEPTH) in found
    )
    assert Program.parse("0-5 (6)*2@0.5 7", DEPTH) in found, "the repeat, damped"
    assert not {A, B, C, IDENTITY} & set(found) and len(variations(table(rows), 1, count=2)) == 2
    assert all(shares_trunk(p, 4) for p in variations(table(rows), 4, count=20))
