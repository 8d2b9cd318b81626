"""Dense labels, mining of menus, training and calibration of selectors, on data with a known best
answer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polar_fx.errors import InputError, RecordFileError
from polar_fx.judge.verdict import Verdict
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.selector import SelectorNetwork
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.runtime.trunk import shares_trunk
from polar_fx.search.records.records import Explored, SearchRecord
from polar_fx.training.mining import (
    best_static,
    candidates,
    edits_as_programs,
    finalists,
    mine,
    variations,
)
from polar_fx.training.pipeline import TrainingConfig, fit, mine_menu, train_predictor
from polar_fx.training.selector_training import (
    Labels,
    SelectorConfig,
    choose_all,
    price_of,
    train_selector,
)
from polar_fx.training.verdict_table import VerdictTable, listed_records

DEPTH = 8
IDENTITY = Program.identity(DEPTH)
A, B, C, D = (Program.parse(t, DEPTH) for t in ("skip 3", "skip 4-5", "repeat 6", "skip 0"))


def question(name: str, task: str = "t", cell: str = "c") -> Question:
    return Question(name, task, f"what is {name}?", ("1",), None, cell)


def record(
    name: str,
    baseline: bool,
    right: dict[Program, bool],
    task: str = "t",
    cell: str = "c",
    **more: Any,
) -> SearchRecord:
    def verdict(correct: bool) -> Verdict:
        return Verdict(correct, -0.1 if correct else -3.0, 1.0 if correct else -1.0)

    explored = tuple(Explored(p, verdict(r), float(r)) for p, r in right.items())
    return SearchRecord(question(name, task, cell), DEPTH, verdict(baseline), explored, **more)


def table(
    rows: list[tuple[bool, dict[Program, bool]]], cells: list[str] | None = None
) -> VerdictTable:
    names = cells or ["c"] * len(rows)
    return VerdictTable.of(
        [record(f"q{i}", base, right, cell=names[i]) for i, (base, right) in enumerate(rows)]
    )


# ------------------------------------------------------------------------------------------- tables


def test_a_table_has_every_program_on_every_question() -> None:
    made = table([(True, {A: False, B: True}), (False, {B: False, A: True})])
    assert made.programs == (IDENTITY, A, B) and made.right.tolist() == [
        [True, False, True],
        [False, True, False],
    ]
    assert made.log_likelihood[0].tolist() == [-0.1, -3.0, -0.1] and made.steps.tolist() == [
        8,
        7,
        6,
    ]
    assert made.choose([B]).right.tolist() == [[True, True], [False, False]]
    assert made.rows(np.array([False, True])).right.tolist() == [[False, True, False]]
    other = table([(True, {C: True, A: False}), (False, {C: False, A: True})])
    assert made.beside(other).programs == (IDENTITY, A, B, C) and made.beside(other).right[
        :, 3
    ].tolist() == [True, False]
    with pytest.raises(InputError, match="'q1' has no verdict of program 0-3 6-7"):
        table([(True, {A: False, B: True}), (False, {A: True})])
    with pytest.raises(InputError, match="different questions"):
        made.beside(made.rows(np.array([1, 0])))
    with pytest.raises(InputError, match="no question was asked"):
        VerdictTable.of([])


class Runs:
    """Answers as a function tells, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, rows: Any, programs: Any) -> Any:
        for q, _ in rows:
            self.asked.append(q.id)
            yield record(q.id, False, {p: p == A for p in programs[q.id]})


def test_listed_records_go_on_where_they_ended(tmp_path: Path) -> None:
    rows = [(question(f"q{i}"), EncodedQuestion(f"q{i}", (1,), (2,), ((3,),))) for i in range(5)]
    programs = {q.id: (A, B) if q.id != "q1" else (C,) for q, _ in rows}
    runs = Runs()
    stopped = iter([0, 0])

    def broken(left: Any, wanted: Any) -> Any:
        for each in runs(left, wanted):
            next(stopped)
            yield each

    def listed(programs: Any, run: Any, model: str = "m", **more: Any) -> Any:
        return listed_records(
            tmp_path / "a.jsonl",
            rows,
            programs,
            model=model,
            depth=DEPTH,
            prompt={},
            run=run,
            **more,
        )

    with pytest.raises((StopIteration, RuntimeError)):
        listed(programs, broken)
    seen: list[tuple[int, int]] = []
    found = listed(programs, runs, progress=lambda *a: seen.append(a))
    assert [r.question.id for r in found] == [f"q{i}" for i in range(5)] and seen[-1] == (5, 5)
    assert runs.asked == ["q0", "q1", "q2", "q2", "q3", "q4"], (
        "only the question in flight is run again"
    )
    assert [e.program for e in found[1].explored] == [C]
    assert listed(programs, runs) == found and len(runs.asked) == 6
    for other, model in (({**programs, "q0": (A,)}, "m"), (programs, "n")):
        with pytest.raises(RecordFileError, match="another search"):
            listed(other, runs, model)


# ------------------------------------------------------------------------------------------- mining


def test_candidates_are_valid_share_the_trunk_and_were_not_overturned() -> None:
    records = [
        record("a", False, {A: True, B: False, D: True}),
        record("b", True, {A: True, C: True}, verified={C: Verdict(False)}),
        record("c", True, {B: True}),
    ]
    assert set(candidates(records, 1, 10)) == {A, B}, "D skips the trunk, C was found wrong again"
    assert set(candidates(records, 0, 10)) == {A, B, D}
    assert candidates(records, 1, 1) == [A]
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
    found = variations(table(rows), 1, 20)
    assert (
        Program.parse("skip 3-5", DEPTH) in found
        and Program.parse("skip 3, repeat 6", DEPTH) in found
    )
    assert Program.parse("0-5 (6)*2@0.5 7", DEPTH) in found, "the repeat, damped"
    assert not {A, B, C, IDENTITY} & set(found) and len(variations(table(rows), 1, 2)) == 2
    assert all(shares_trunk(p, 4) for p in variations(table(rows), 4, 20))


# ----------------------------------------------------------------------------------------- training


def planted(n: int, seed: int, flip: float = 0.1) -> Labels:
    """Which program is right is written in the first feature: A where it is high, B where it is
    low; the identity seldom.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    side = x[:, 0] > 0
    right = np.stack(
        [rng.random(n) < 0.3, side ^ (rng.random(n) < flip), ~side ^ (rng.random(n) < flip)], 1
    )
    return Labels(torch.tensor(x, dtype=torch.float32), right, np.where(right, -0.2, -2.0))


CONFIG = TrainingConfig(
    Features(1, 8),
    budgets=(0.9, 0.8),
    selector=SelectorConfig(width=16, epochs=60, learning_rate=0.01),
)


def test_a_planted_signal_is_learned_and_calibrated() -> None:
    menu = Menu.of([A, B])
    selector, measured = fit(menu, planted(600, 0), planted(600, 1), CONFIG)
    test = planted(1000, 2)
    chances = selector.probabilities(test.features)
    chosen = choose_all(chances, menu.steps, DEPTH, selector.calibration.threshold)
    accuracy = test.right[np.arange(1000), chosen].mean()
    assert accuracy > 0.8 > test.right.mean(0).max() + 0.2, "better than any one program"
    assert (
        measured["ece"]["after"] < 0.1
        and measured["log_loss"]["after"] < measured["log_loss"]["base_rates"] - 0.1
    )
    assert (
        measured["validation"]["accuracy"]["accuracy"] > 0.8
        and measured["threshold"]["tau"] is not None
    )
    mean = menu.steps[
        choose_all(
            planted_chances(selector), menu.steps, DEPTH, -np.inf, selector.calibration.prices[0.8]
        )
    ].mean()
    assert mean <= 0.8 * DEPTH
    again, same = fit(menu, planted(600, 0), planted(600, 1), CONFIG)
    assert np.array_equal(again.probabilities(test.features), chances) and same == measured


@pytest.mark.parametrize("width", [0, 16])
def test_the_mean_of_networks_is_one_network(width: int) -> None:
    config = SelectorConfig(width=width, epochs=3, learning_rate=0.01)
    parts = [
        train_selector(planted(200, 0), planted(200, 1), replace(config, networks=1, seed=s))[0]
        for s in (5, 1005, 2005)
    ]
    epochs: list[int] = []
    whole, told = train_selector(
        planted(200, 0),
        planted(200, 1),
        replace(config, networks=3, seed=5),
        lambda epoch, _: epochs.append(epoch),
    )
    features = planted(50, 2).features
    with torch.no_grad():
        torch.testing.assert_close(
            whole(features),
            torch.stack([part(features) for part in parts]).mean(0),
            rtol=0,
            atol=1e-5,
        )
    assert epochs == list(range(1, 10)) and len(told["networks"]) == 3
    assert (
        whole.inner is None
        if width == 0
        else whole.inner is not None and whole.inner.out_features == 48
    )
    with pytest.raises(InputError, match="at least one"):
        SelectorNetwork.mean_of([])


def planted_chances(selector: Any) -> np.ndarray:
    return selector.probabilities(planted(600, 1).features)


def test_without_a_signal_the_identity_stays() -> None:
    rng = np.random.default_rng(3)

    def noise(n: int) -> Labels:
        right = rng.random((n, 3)) < np.array([0.6, 0.4, 0.4])
        return Labels(
            torch.tensor(rng.normal(size=(n, 6)), dtype=torch.float32), right, np.zeros((n, 3))
        )

    selector, measured = fit(Menu.of([A, B]), noise(400), noise(400), CONFIG)
    test = noise(2000)
    chosen = choose_all(
        selector.probabilities(test.features),
        selector.menu.steps,
        DEPTH,
        selector.calibration.threshold,
    )
    lost = test.right[:, 0].mean() - test.right[np.arange(2000), chosen].mean()
    assert (
        lost < 0.02
        and measured["validation"]["accuracy"]["accuracy"]
        >= measured["validation"]["identity"]["accuracy"] - 0.01
    )


def test_likelihood_is_a_softer_label() -> None:
    labels = planted(50, 4)
    mixed = labels.targets(0.5)
    assert torch.equal(labels.targets(0.0), torch.tensor(labels.right, dtype=torch.float32))
    np.testing.assert_allclose(
        mixed, 0.5 * labels.right + 0.5 * np.exp(labels.log_likelihood), atol=1e-6
    )
    generated = Labels(labels.features, labels.right, np.full(labels.right.shape, np.nan))
    assert generated.targets(0.0).isfinite().all()
    with pytest.raises(InputError, match="teacher-forced"):
        generated.targets(0.5)


def test_prices_meet_their_budget_and_no_lower_one_does() -> None:
    rng = np.random.default_rng(5)
    chances, steps = rng.random((300, 4)), np.array([8.0, 6.0, 4.0, 10.0])
    last = -1.0
    assert (
        price_of(chances, steps, DEPTH, 0.5) is None
        and price_of(chances, steps, DEPTH, 0.4) is None
    ), "out of reach"
    for budget in (1.2, 1.0, 0.8, 0.6, 0.55):
        price = price_of(chances, steps, DEPTH, budget)
        assert price is not None and price >= last
        assert (
            steps[choose_all(chances, steps, DEPTH, -np.inf, price)].mean() <= budget * DEPTH + 1e-9
        )
        if price > 1e-6:
            lower = choose_all(chances, steps, DEPTH, -np.inf, price - 1e-6)
            assert steps[lower].mean() > budget * DEPTH
        last = price


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (lambda: Labels(torch.zeros(3, 2), np.zeros((2, 2), bool), np.zeros((2, 2))), "do not fit"),
        (
            lambda: Labels(torch.zeros(0, 2), np.zeros((0, 2), bool), np.zeros((0, 2))),
            "no labelled question",
        ),
        (
            lambda: Labels(
                torch.tensor([[0.0], [np.nan]]), np.zeros((2, 2), bool), np.zeros((2, 2))
            ),
            "number 1 are not fin",
        ),
        (
            lambda: train_selector(
                *[Labels(torch.zeros(3, 2), np.zeros((3, 2), bool), np.zeros((3, 2)))] * 2
            ),
            "wrong on all 3",
        ),
        (
            lambda: train_selector(
                *[Labels(torch.zeros(3, 2), np.ones((3, 2), bool), np.zeros((3, 2)))] * 2
            ),
            "right on all 3",
        ),
        (lambda: SelectorConfig(dropout=1.0), "dropout of selector training is 1.0"),
        (lambda: TrainingConfig(menu_size=1), "menu_size is 1"),
        (lambda: TrainingConfig(budgets=(1.5,)), "between 0 and 1"),
    ],
)
def test_what_cannot_be_trained_on(labels: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        labels()


# ----------------------------------------------------------------------------------------- pipeline


def test_from_records_to_a_predictor() -> None:
    """A world in which A answers questions of odd numbers and B those of even ones."""
    config = TrainingConfig(
        Features(1, 8),
        4,
        num_candidates=40,
        num_edits=30,
        num_variations=4,
        screen_questions=20,
        num_finalists=8,
        final_questions=40,
        budgets=(0.9,),
        selector=SelectorConfig(width=8, epochs=80, learning_rate=0.02),
    )
    asked: dict[str, int] = {}
    drawn: list[list[Question]] = []

    def number(q: Question) -> int:
        return int(q.id[1:])

    def right(q: Question, p: Program) -> bool:
        return p == (A if number(q) % 2 else B)

    def rows(first: int, count: int) -> Any:
        made = [question(f"q{i}") for i in range(first, first + count)]
        return [(q, EncodedQuestion(q.id, (1,), (2,), ((3,),))) for q in made]

    def dense(name: str, part: Any, programs: Any) -> VerdictTable:
        asked[name] = len(part) * len(programs)
        drawn.append([q for q, _ in part])
        listed = [p for p in programs if p != IDENTITY]
        return VerdictTable.of(
            [record(q.id, right(q, IDENTITY), {p: right(q, p) for p in listed}) for q, _ in part]
        )

    def features_of(part: Any) -> torch.Tensor:
        return torch.tensor([[float(number(q) % 2), 1.0] for q, _ in part])

    searched = [record(f"q{i}", False, {A: bool(i % 2), C: False}) for i in range(1000, 1010)]
    given: dict[str, Any] = {
        "dense": dense,
        "features_of": features_of,
        "depth": DEPTH,
        "config": config,
    }
    selector, results = train_predictor(searched, rows(0, 200), rows(500, 100), **given)
    assert {A, B} <= set(selector.menu.programs) and len(selector.menu) <= 4
    measured = results["validation"]
    assert (
        measured["accuracy"]["accuracy"] == 1.0
        and abs(measured["best_static_of_train"]["accuracy"] - 0.5) < 0.1
    )
    assert set(asked) == {"screen", "variations", "finalists", "train", "validation"}
    assert (
        results["questions"]["screened"] == 60
        and results["finalists"] == 9
        and asked["finalists"] == 40 * 8
    )
    assert not {q.id for q in drawn[0]} & {q.id for q in drawn[2]}, (
        "the best are tried on other questions"
    )
    with_tasks = [(replace(q, task=f"t{i // 50}"), e) for i, (q, e) in enumerate(rows(0, 200))]
    screened = mine_menu([], with_tasks, dense, DEPTH, config)
    assert len({q.task for q in drawn[-1]}) == 4, "questions of every task, wherever they stand"
    assert screened.programs[0] == IDENTITY and all(shares_trunk(p, 1) for p in screened.programs)
    with pytest.raises(InputError, match="no program to screen"):
        mine_menu([], with_tasks, dense, DEPTH, replace(config, num_edits=0))
    with pytest.raises(InputError, match="0 validation questions"):
        train_predictor(searched, rows(0, 200), [], **given)
