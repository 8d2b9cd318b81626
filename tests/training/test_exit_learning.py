"""Early exits learned from planted scores: the surest questions leave; no answer is looked at."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_fx.errors import InputError
from polar_fx.judge.early_exit import NUM_FEATURES, ChoiceScores, EarlyExit, EarlyExits, read
from polar_fx.training.exit_learning import learn_exit, learn_readout

DEPTH = 20


def planted(n: int, seed: int) -> tuple[dict[int, list[ChoiceScores]], list[ChoiceScores]]:
    """After 5 layers a lead of more than 2 tells what all layers choose, a smaller one tells
    nothing; after 10 nothing is told at all.
    """
    rng = np.random.default_rng(seed)
    early, late, whole = [], [], []
    for _ in range(n):
        place, sure = int(rng.integers(3)), rng.random() < 0.4
        lead = rng.uniform(2.2, 4) if sure else rng.uniform(0, 1.8)
        shown = place if sure else int(rng.integers(3))
        early.append(scores_of(shown, lead))
        late.append(scores_of(int(rng.integers(3)), rng.uniform(0, 4)))
        whole.append(scores_of(place, rng.uniform(0, 9)))
    return {5: early, 10: late}, whole


def scores_of(place: int, lead: float) -> ChoiceScores:
    scores = [-9.0, -9.0, -9.0]
    scores[place] += lead
    return ChoiceScores(tuple(scores), (1.0,) * 3, (2, 3, 2), (8, 8, 9))


def test_the_surest_questions_leave_and_choose_as_the_whole_model() -> None:
    candidates, whole = planted(600, 0)
    found = learn_exit(candidates, whole, depth=DEPTH, budget=0.8)
    assert found.num_steps == 5, "nothing is known after 10"
    # to keep 80 % of the steps, 0.2 / (1 - 5/20) of the questions leave
    assert found.expected["leave"] == pytest.approx(0.2 / 0.75, abs=0.01)
    assert found.expected["steps"] == pytest.approx(0.8, abs=0.01)
    assert found.expected["same"] > 0.98 and found.expected["differ"] < 0.01
    others, truth = planted(600, 1)
    told = found.read(others[5])
    leaves = found.leaves(told)
    same = told.place == [each.best for each in truth]
    assert 0.2 < leaves.mean() < 0.34 and same[leaves].mean() > 0.97 > same.mean() + 0.3


def test_no_more_leave_than_the_risk_allows() -> None:
    candidates, whole = planted(600, 0)
    bold = learn_exit(candidates, whole, depth=DEPTH, budget=0.45)
    assert bold.expected["steps"] == pytest.approx(0.45, abs=0.01)
    assert bold.expected["differ"] > 0.1
    careful = learn_exit(candidates, whole, depth=DEPTH, budget=0.45, risk=0.02)
    assert careful.expected["differ"] <= 0.02 and careful.expected["leave"] > 0.3
    # after 10 layers nothing is known: hardly one may leave
    blind = learn_exit({10: candidates[10]}, whole, depth=DEPTH, budget=0.9, risk=0.0)
    assert blind.expected["leave"] < 0.03
    all_alike = [scores_of(0, 1.0)] * len(whole)
    none = learn_exit({10: all_alike}, whole, depth=DEPTH, budget=0.9, risk=0.0)
    assert none.threshold == math.inf and not none.leaves(none.read(candidates[10])).any()


def test_known_answers_bound_the_loss_and_teach_nothing_else() -> None:
    candidates, whole = planted(600, 0)
    right = [each.best for each in whole]
    settings: dict[str, Any] = dict(depth=DEPTH, budget=0.45)
    bold = learn_exit(candidates, whole, **settings, right=right)
    free = learn_exit(candidates, whole, **settings)
    assert bold.expected["lost"] == bold.expected["differ"] > 0.1, "all that changes was right"
    assert free.expected == {**bold.expected, "lost": 0.0}
    assert (free.threshold, free.weights) == (bold.threshold, bold.weights)
    careful = learn_exit(candidates, whole, **settings, loss=0.01, right=right)
    assert careful.expected["lost"] <= 0.01 and careful.expected["leave"] > 0.3
    assert careful.weights == bold.weights
    # where the whole model is never right, nothing can be lost
    never = [(each.best + 1) % 3 for each in whole]
    gains = learn_exit(candidates, whole, **settings, loss=0.0, right=never)
    assert gains.expected["leave"] == bold.expected["leave"] and gains.expected["lost"] < 0


def test_equally_sure_questions_leave_together_or_not_at_all() -> None:
    whole = [scores_of(0, 1.0)] * 40
    early = [scores_of(int(i % 10 == 9), 1.0) for i in range(40)]
    found = learn_exit({5: early}, whole, depth=DEPTH, budget=0.9, risk=0.0)
    assert found.expected["differ"] == 0.0


def test_a_readout_knows_what_the_whole_model_likes() -> None:
    """Here the shortest choice, whatever the first layers say: a lead would tell nothing."""
    rng = np.random.default_rng(6)
    early, whole = [], []
    for _ in range(400):
        sizes = tuple(int(n) for n in rng.permutation([3, 6, 12]))
        scores = tuple(rng.uniform(-9, -3, 3).tolist())
        early.append(ChoiceScores(scores, (1.0,) * 3, sizes, tuple(4 * n for n in sizes)))
        liked = tuple(-float(n) for n in sizes)
        whole.append(ChoiceScores(liked, (1.0,) * 3, sizes, tuple(4 * n for n in sizes)))
    found = learn_exit({5: early}, whole, depth=DEPTH, budget=0.5)
    assert found.expected["same"] == 1.0 and found.expected["leave"] > 0.6
    agree = [a.best == b.best for a, b in zip(early, whole, strict=True)]
    assert np.mean(agree) < 0.5


def test_the_readout_is_where_the_likelihood_is_highest() -> None:
    candidates, whole = planted(200, 8)
    early, target = candidates[5], np.array([each.best for each in whole])
    weights = learn_readout(early, target)
    spread = np.concatenate([each.features() for each in early]).std(0)

    def loss(weights: np.ndarray) -> float:
        told = read(weights, early).log_shares
        likelihood = sum(row[i] for row, i in zip(told, target.tolist(), strict=True))
        return -likelihood + ((weights * spread) ** 2).sum() / 2

    best = loss(weights)
    for k in range(NUM_FEATURES):
        for step in (-1e-3, 1e-3):
            assert loss(weights + step * np.eye(NUM_FEATURES)[k]) >= best - 1e-9


def test_a_smaller_budget_sends_more_away() -> None:
    candidates, whole = planted(400, 2)
    shares = [
        learn_exit(candidates, whole, depth=DEPTH, budget=budget).expected["leave"]
        for budget in (0.95, 0.9, 0.7)
    ]
    assert shares == sorted(shares)


def test_scores_that_are_no_numbers_are_never_best() -> None:
    found = ChoiceScores((math.nan, -3.0, -math.inf), (1.0,) * 3, (1, 2, 3), (4, 4, 4))
    assert found.best == 1 and np.isfinite(found.features()).all()


@pytest.mark.parametrize(
    ("budget", "n", "match"),
    [(1.0, 50, "budget is 1.0"), (0.2, 50, "no exit after 5, 10 of 20"), (0.8, 9, "9 train")],
)
def test_what_cannot_be_learned(budget: float, n: int, match: str) -> None:
    candidates, whole = planted(n, 3)
    with pytest.raises(InputError, match=match):
        learn_exit(candidates, whole, depth=DEPTH, budget=budget)


def test_saved_and_loaded(tmp_path: Path) -> None:
    candidates, whole = planted(100, 4)
    made = learn_exit(candidates, whole, depth=DEPTH, budget=0.8)
    never = dataclasses.replace(made, threshold=math.inf)
    exits = EarlyExits({"a": made, "b": never}, "0" * 64, "choices", {"model_name": "tiny"})
    path = exits.save(tmp_path / "exits.json")
    again = EarlyExits.load(path)
    assert again == exits
    assert np.array_equal(again.tasks["a"].read(whole).sureness, made.read(whole).sureness)
    path.write_text('{"format": "other"}')
    with pytest.raises(InputError, match="holds no early exits: it is no polar_fx"):
        EarlyExits.load(path)
    path.write_text(path.read_text()[:5])
    with pytest.raises(InputError, match="holds no early exits"):
        EarlyExits.load(path)
    with pytest.raises(InputError, match="cannot read"):
        EarlyExits.load(tmp_path / "none.json")
    for damage, told in (
        ({"weights": 5}, "should be texts"),
        ({"notes": None}, "holds no early exits"),
        ({"tasks": {"a": {**made.to_dict(), "weights": [0.0] * 8}}}, "does not fit the 7 features"),
        ({"tasks": {"a": {**made.to_dict(), "weights": ["1"] * 7}}}, "no list of finite numbers"),
        ({"tasks": {"a": {**made.to_dict(), "weights": [10**400] * 7}}}, "holds no early exits"),
        (
            {"tasks": {"a": {**made.to_dict(), "num_steps": 2.5}}},
            "num_steps is 2.5, not an integer",
        ),
        ({"tasks": {"a": {**made.to_dict(), "num_steps": math.inf}}}, "not an integer"),
        ({"tasks": {"a": {**made.to_dict(), "threshold": -math.inf}}}, "threshold is -inf"),
        ({"version": 1}, "is of version 1, and 2 is read here; learn the exits again"),
        ({"tasks": {"a": {**made.to_dict(), "num_steps": 0}}}, "after 0 layers"),
    ):
        exits.save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
        with pytest.raises(InputError, match=told):
            EarlyExits.load(path)
    with pytest.raises(InputError, match="does not fit"):
        EarlyExit(4, 0.5, (1.0,), {})
