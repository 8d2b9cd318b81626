"""Arms by generated answers: programs and samples on four questions, counted by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from evaluation_samples import CHANCES, IDENTITY, LONG, QUESTIONS, RECORDS, ROWS, SHORT, selector
from polar_fx.evaluation.answers import Answer, Rescues, Row
from polar_fx.evaluation.choices import SELECTOR_ACCURACY, Choice
from polar_fx.evaluation.votes import GeneratedArms, generated_arms
from polar_fx.program import Program
from polar_fx.stats.arms import IDENTITY as IDENTITY_ARM
from polar_fx.stats.arms import ArmResult

pytest.importorskip("math_verify")

# right are 2, 3, 4 and 6
SAID = {
    ("a1", IDENTITY): "2",
    ("a1", SHORT): "5",
    ("a2", IDENTITY): "3",  # in a form that teacher forcing calls wrong
    ("a2", SHORT): "3",
    ("a2", LONG): "4",
    ("m1", IDENTITY): "5",
    ("m1", SHORT): "4",
    ("m2", IDENTITY): "6",
    ("m2", SHORT): "x",
    ("m2", LONG): "7",
}
SAMPLED = {
    "a1": ["2", "1"],
    "a2": ["4", "3"],
    "m1": ["5", "4"],
    "m2": ["6", "6"],
}
TOKENS = {IDENTITY: 1, SHORT: 2, LONG: 3}
# nats a token of each program
SURE = {IDENTITY: -1.0, SHORT: -0.5, LONG: -2.0}


class Written:
    """An answerer that reads from the tables above, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Program]] = []
        self.temperature = 0.0

    def greedy(self, pairs: Sequence[tuple[Row, Program]]) -> list[Answer]:
        self.asked += [(question.id, program) for (question, _), program in pairs]
        return [Answer(SAID[q.id, p], TOKENS[p], True, SURE[p] * TOKENS[p]) for (q, _), p in pairs]

    def sampled(
        self, rows: Sequence[Row], program: Program, *, count: int, temperature: float, seed: int
    ) -> list[list[Answer]]:
        assert program == IDENTITY and count == 2 and seed == 7
        self.temperature = temperature
        answers: list[list[Answer]] = []
        for question, _ in rows:
            answers.append([Answer(t, 5, t != "4", 0.0) for t in SAMPLED[question.id]])
        return answers


CHOSEN = Choice.single(SELECTOR_ACCURACY, [IDENTITY, SHORT, SHORT, LONG])


def arms_by(answerer: Any, unseen: Sequence[str] = ()) -> GeneratedArms:
    return generated_arms(
        answerer,
        selector(),
        chances=CHANCES,
        chosen=CHOSEN,
        records=RECORDS,
        rows=ROWS,
        votes=2,
        seed=7,
        unseen=unseen,
    )


@pytest.fixture(scope="module")
def written() -> Written:
    return Written()


@pytest.fixture(scope="module")
def found(written: Written) -> GeneratedArms:
    return arms_by(written, unseen=["mul"])


def arms_of(found: GeneratedArms, name: str) -> list[ArmResult]:
    return [arm for arm in found.arms if arm.name == name]


def right(found: GeneratedArms, name: str) -> list[bool]:
    return [bool(r) for arm in arms_of(found, name) for r in arm.right]


def steps(found: GeneratedArms, name: str) -> list[float]:
    return [float(s) for arm in arms_of(found, name) for s in arm.steps]


def tokens(found: GeneratedArms, name: str) -> list[float]:
    counts = [arm.generated_tokens for arm in arms_of(found, name)]
    return [float(n) for of_arm in counts if of_arm is not None for n in of_arm]


def test_every_program_runs_once_on_a_question(written: Written, found: GeneratedArms) -> None:
    """The identity, the choice, and the two likeliest, of which the identity always is one: the
    last of them gives way to it.
    """
    assert written.asked == [
        ("a1", IDENTITY),
        ("a1", SHORT),
        ("a2", IDENTITY),
        ("a2", SHORT),
        ("m1", IDENTITY),
        ("m1", SHORT),
        ("m2", IDENTITY),
        ("m2", LONG),
    ]
    assert 0 < written.temperature < 1


def test_arms_and_tasks(found: GeneratedArms) -> None:
    names = list(dict.fromkeys(arm.name for arm in found.arms))
    assert names == [
        IDENTITY_ARM,
        SELECTOR_ACCURACY,
        "vote of 2 programs",
        "most confident of 2 programs",
        "vote of 2 samples of the identity",
    ]
    tasks = [(arm.task, arm.unseen, arm.n) for arm in arms_of(found, names[2])]
    assert tasks == [("add", False, 2), ("mul", True, 2)]
    assert {tuple(arm.identity_steps) for arm in found.arms} == {(6.0, 6.0)}
    beside = [bool(r) for arm in arms_of(found, names[2]) for r in arm.identity_right]
    assert beside == right(found, IDENTITY_ARM)


def test_single_programs_by_hand(found: GeneratedArms) -> None:
    assert right(found, IDENTITY_ARM) == [True, True, False, True]
    assert steps(found, IDENTITY_ARM) == [6, 6, 6, 6] and tokens(found, IDENTITY_ARM) == [1] * 4
    assert right(found, SELECTOR_ACCURACY) == [True, True, True, False]
    assert steps(found, SELECTOR_ACCURACY) == [6, 4, 4, 7]
    assert tokens(found, SELECTOR_ACCURACY) == [1, 2, 2, 3]


def test_votes_over_programs_by_hand(found: GeneratedArms) -> None:
    # identity and short, short and identity, identity and short, long and identity: of equals the
    # likelier program's answer
    assert right(found, "vote of 2 programs") == [True, True, False, False]
    # all that ran counts: 6 + 4, and 7 + 6 steps; 1 + 2, and 3 + 1 tokens
    assert steps(found, "vote of 2 programs") == [10, 10, 10, 13]
    assert tokens(found, "vote of 2 programs") == [3, 3, 3, 4]
    # the short one is surest, and the identity is surer than the long one
    assert right(found, "most confident of 2 programs") == [False, True, True, True]
    assert steps(found, "most confident of 2 programs") == [10, 10, 10, 13]


def test_votes_over_samples_by_hand(found: GeneratedArms) -> None:
    name = "vote of 2 samples of the identity"
    assert right(found, name) == [True, False, False, True]  # of equals the first
    assert tokens(found, name) == [10] * 4 and steps(found, name) == [12] * 4
    readable = [arm.format_valid for arm in arms_of(found, name)]
    assert [r.tolist() for r in readable if r is not None] == [[True, False], [True, True]]


def test_what_becomes_of_gains_by_hand(found: GeneratedArms) -> None:
    """By teacher forcing the identity is right on a1 and m2, the choice on a1, a2 and m2."""
    assert found.rescues == {
        "add": Rescues(reasoning=0, format=1, lost=0),
        "mul": Rescues(reasoning=1, format=0, lost=1),
    }
    assert found.agreement == pytest.approx(3 / 4)  # not on a2
    assert found.to_dict() == {
        "n": 4,
        "agreement": pytest.approx(0.75),
        "rescues": {
            "add": {"reasoning": 0, "format": 1, "lost": 0},
            "mul": {"reasoning": 1, "format": 0, "lost": 1},
        },
    }


def test_tasks_that_were_all_trained_on_are_also_taken_together() -> None:
    both = arms_by(Written())
    assert both.rescues["overall"] == Rescues(reasoning=1, format=1, lost=1)
    assert {q.task for q in QUESTIONS} | {"overall"} == set(both.rescues)
