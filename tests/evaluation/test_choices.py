"""Choices: what each method runs on four questions, found by hand, and what their verdicts make of
it.
"""

from typing import Any

import numpy as np
import pytest

from evaluation_samples import (
    CHANCES,
    DEPTH,
    IDENTITY,
    LONG,
    MENU,
    PROPOSALS,
    QUESTIONS,
    RECORDS,
    SHORT,
    selector,
)
from polar_fx.errors import InputError
from polar_fx.evaluation import choices
from polar_fx.evaluation.choices import Choice
from polar_fx.predictor.policy import Calibration, Policy
from polar_fx.program import Program


def singles(choice: Choice) -> list[Program]:
    return [program for (program,) in choice.programs]


def test_only_an_oracle_may_run_several_programs_on_a_question() -> None:
    several = ((IDENTITY, SHORT),)
    assert Choice("any", several, True).programs == several
    with pytest.raises(InputError, match="'any' runs several programs on a question: only an"):
        Choice("any", several)
    with pytest.raises(InputError, match="'none' runs several"):
        Choice("none", ((),))


def test_a_choice_on_some_questions() -> None:
    choice = Choice("each", ((IDENTITY, SHORT), (SHORT, LONG), (LONG, IDENTITY)), True)
    part = choice.at([2, 0])
    assert part.programs == ((LONG, IDENTITY), (IDENTITY, SHORT))
    assert part.name == "each" and part.oracle


@pytest.mark.parametrize(
    ("policy", "calibration", "expected"),
    [
        # the likeliest, equal ones by fewer steps, from gains of 0.35 on
        (Policy("accuracy"), Calibration(0.35), [IDENTITY, SHORT, IDENTITY, LONG]),
        (Policy("accuracy"), Calibration(0.6), [IDENTITY, IDENTITY, IDENTITY, LONG]),
        (Policy("accuracy"), Calibration(), [IDENTITY] * 4),
        # at most 0.7 x 6 steps: nothing but the short one fits
        (Policy("steps", 0.7), Calibration(), [SHORT] * 4),
        # one step costs 0.6 / 6: 0.6-0.6, 0.5-0.4, 0.1-0.7; ...; 0.1-0.6, 0.4-0.4, 0.9-0.7
        (Policy("mean_steps", 0.9), Calibration(prices={0.9: 0.6}), [SHORT, SHORT, SHORT, LONG]),
    ],
    ids=["threshold", "high threshold", "never", "steps", "mean steps"],
)
def test_a_policy_by_hand(
    policy: Policy, calibration: Calibration, expected: list[Program]
) -> None:
    found = choices.by_policy("it", selector(calibration), policy=policy, proposals=PROPOSALS)
    assert singles(found) == expected and not found.oracle


def test_policies_that_need_no_probabilities_are_not_compared() -> None:
    with pytest.raises(InputError, match=r"policy identity is not compared here; use accuracy"):
        choices.by_policy("it", selector(), policy=Policy("identity"), proposals=PROPOSALS)
    with pytest.raises(InputError, match="0.9"):
        choices.by_policy(
            "it", selector(), policy=Policy("mean_steps", 0.9), proposals=PROPOSALS
        )  # has no price


def test_the_likeliest_disregards_the_threshold_and_breaks_ties_by_steps() -> None:
    found = choices.likeliest("it", MENU, chances=CHANCES)
    assert singles(found) == [IDENTITY, SHORT, SHORT, LONG]


def test_static_programs() -> None:
    assert singles(choices.static("it", LONG, n=3)) == [LONG] * 3
    by_task = choices.static_by_task("it", {"mul": SHORT}, questions=QUESTIONS)
    assert singles(by_task) == [IDENTITY, IDENTITY, SHORT, SHORT]


def test_random_programs_have_their_steps_and_leave_the_trunk() -> None:
    found = singles(choices.random_skips("it", DEPTH, num_steps=4, trunk=2, n=20, seed=1))
    assert len(found) == 20 and len(set(found)) > 1
    for program in found:
        path = list(program.path)
        assert len(path) == 4 and path[:2] == [0, 1] and path == sorted(set(path))
    assert found == singles(
        choices.random_skips("other", DEPTH, num_steps=4, trunk=2, n=20, seed=1)
    )
    assert found != singles(choices.random_skips("it", DEPTH, num_steps=4, trunk=2, n=20, seed=2))
    assert singles(choices.random_skips("it", DEPTH, num_steps=DEPTH, trunk=2, n=1, seed=0)) == [
        IDENTITY
    ]


def test_oracles_by_hand() -> None:
    every = choices.oracle("any", MENU, n=2)
    assert every.programs == (MENU.programs,) * 2 and every.oracle
    two = choices.top_k("pass@2", MENU, chances=CHANCES, k=2)
    # equal probabilities stay in the order of the menu
    assert two.oracle and two.programs == (
        (IDENTITY, SHORT),
        (SHORT, LONG),
        (IDENTITY, SHORT),
        (LONG, SHORT),
    )
    assert choices.top_k("pass@9", MENU, chances=CHANCES, k=9).programs[0] == MENU.programs


def test_all_that_is_compared_of_a_selector() -> None:
    found = choices.selector_choices(selector(Calibration(0.35, {0.9: 0.6})), PROPOSALS)
    assert [(c.name, c.oracle) for c in found] == [
        ("selector: accuracy", False),
        ("selector: likeliest", False),
        ("selector: mean steps <= 0.9", False),
        ("selector: steps <= 0.9", False),
        ("any program of the menu", True),
        ("selector: pass@3", True),
        ("selector: pass@5", True),
    ]
    assert singles(found[0]) == [IDENTITY, SHORT, IDENTITY, LONG]
    assert singles(found[3]) == [SHORT] * 4  # 0.9 x 6 is less than 6


def test_what_has_to_be_judged_is_each_program_once_and_not_the_identity() -> None:
    asked = [
        choices.static("identity", IDENTITY, n=2),
        Choice("a", ((LONG,), (IDENTITY,))),
        Choice("b", ((SHORT, LONG), (SHORT,)), True),
    ]
    assert choices.wanted_programs(asked, QUESTIONS[:2]) == {"a1": (LONG, SHORT), "a2": (SHORT,)}
    with pytest.raises(InputError, match="'a' has programs for 2 questions, not 4"):
        choices.wanted_programs(asked[1:], QUESTIONS)


def test_the_identity_takes_the_place_of_programs_that_do_not_run() -> None:
    identity = Program.identity(4)
    skips, first, second = (Program.parse(text, 4) for text in ("skip 1", "skip 2", "skip 3"))
    choice = Choice("any", ((skips, first), (skips, second), (first, second)), oracle=True)
    found = choice.that_run(lambda program: program not in (skips, second))
    assert found.programs == ((identity, first), (identity,), (first, identity))
    assert found.name == "any" and found.oracle


def test_places_of_tasks_are_in_the_order_in_which_tasks_come() -> None:
    assert choices.places_of(["b", "a", "b"]) == {"b": [0, 2], "a": [1]}
    assert choices.places_of([]) == {}


def test_results_by_hand() -> None:
    chosen = Choice.single("chosen", [IDENTITY, SHORT, SHORT, LONG])
    arms = choices.arm_results([chosen, choices.oracle("any", MENU, n=4)], RECORDS, unseen=["mul"])
    assert [(a.name, a.task, a.oracle, a.unseen) for a in arms] == [
        ("chosen", "add", False, False),
        ("chosen", "mul", False, True),
        ("any", "add", True, False),
        ("any", "mul", True, True),
    ]
    assert [a.right.tolist() for a in arms] == [
        [True, True],
        [False, True],
        [True, True],
        [True, True],
    ]
    assert [a.identity_right.tolist() for a in arms[:2]] == [[True, False], [False, True]]
    # all programs of an oracle count as executed: 6 + 4 + 7
    assert [a.steps.tolist() for a in arms] == [[6, 4], [4, 7], [17, 17], [17, 17]]
    assert {tuple(a.identity_steps) for a in arms} == {(6.0, 6.0)}
    # distinct layers: 6, 4 and 6
    assert arms[1].unique_layers is not None and arms[1].unique_layers.tolist() == [4, 6]
    assert arms[3].unique_layers is not None
    assert arms[3].unique_layers == pytest.approx(np.full(2, 16 / 3))


def test_a_verdict_that_is_missing_is_named() -> None:
    other = Program.parse("skip 0", DEPTH)
    chosen = Choice.single("mine", [IDENTITY, IDENTITY, other, IDENTITY])
    with pytest.raises(InputError, match="question 'm1' has no verdict of .* of 'mine'; judge all"):
        choices.arm_results([chosen], RECORDS)


def test_random_skips_are_programs_that_run() -> None:
    def runs(program: Program) -> bool:
        return DEPTH - 1 in program.path

    sizes: Any = {"num_steps": 4, "trunk": 2, "n": 20, "seed": 1}
    every = singles(choices.random_skips("it", DEPTH, **sizes))
    found = singles(choices.random_skips("it", DEPTH, **sizes, runs=runs))
    assert len(found) == 20 and all(map(runs, found)) and not all(map(runs, every))
