"""Early exits learned from planted scores: the surest questions leave; no answer is looked at."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_fx.errors import InputError
from polar_fx.judge.early_exit import NUM_FEATURES, ChoiceScores, EarlyExit, EarlyExits, read
from polar_fx.stats.risk import least_questions
from polar_fx.training.exit_learning import check_settings, learn_exit, learn_readout

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
    candidates, whole = planted(1200, 0)
    found = learn_exit(candidates, whole, depth=DEPTH, budget=0.8)
    assert found.num_steps == 5 and not found.refused, "nothing is known after 10"
    # to keep 80 % of the steps, 0.2 / (1 - 5/20) of the questions leave, here of the other half
    assert found.expected["questions"] == 600
    assert found.expected["leave"] == pytest.approx(0.2 / 0.75, abs=0.06)
    assert found.expected["steps"] == pytest.approx(0.8, abs=0.05)
    assert found.expected["same"] > 0.98 and found.expected["differ"] < 0.01
    others, truth = planted(600, 1)
    told = found.answers(others[5])
    leaves = np.array([each is not None for each in told])
    assert leaves.tolist() == (found.read(others[5]).sureness >= found.threshold).tolist()
    same = found.read(others[5]).place == [each.best for each in truth]
    assert 0.2 < leaves.mean() < 0.36 and same[leaves].mean() > 0.97 > same.mean() + 0.3


def test_no_more_leave_than_the_risk_allows() -> None:
    candidates, whole = planted(1200, 0)
    bold = learn_exit(candidates, whole, depth=DEPTH, budget=0.45)
    assert bold.expected["steps"] == pytest.approx(0.45, abs=0.05)
    assert bold.expected["differ"] > 0.1
    careful = learn_exit(candidates, whole, depth=DEPTH, budget=0.45, risk=0.02)
    assert careful.expected["differ"] < 0.02 and careful.expected["leave"] > 0.3
    assert bold.num_steps == careful.num_steps and bold.weights == careful.weights


def test_the_bound_of_the_risk_holds_on_other_questions() -> None:
    """It may fail in a fifth of all draws; depth and readout are chosen in each. More than six of
    twelve would be too many by chance alone (0.4 %).
    """
    many, truth = planted(4000, 99)
    target = np.array([each.best for each in truth])
    changed = []
    for seed in range(12):
        candidates, whole = planted(160, seed)
        found = learn_exit(candidates, whole, depth=DEPTH, budget=0.45, risk=0.05, delta=0.2)
        told = found.read(many[found.num_steps])
        leaves = told.sureness >= found.threshold
        changed.append(float((leaves & (told.place != target)).mean()))
    assert sum(share > 0.05 for share in changed) <= 6, changed
    assert max(changed) > 0.02, "and it is no bound that lets nothing leave"


def test_the_half_that_bounds_chooses_nothing() -> None:
    """What its questions score or choose changes neither depth nor readout."""
    candidates, whole = planted(400, 5)
    order = np.random.default_rng(0).permutation(400)
    other, target = planted(400, 6)
    changed = {steps: list(found) for steps, found in other.items()}
    for i in order[:200].tolist():
        target[i] = whole[i]
        for steps, found in candidates.items():
            changed[steps][i] = found[i]
    settings: dict[str, Any] = dict(depth=DEPTH, budget=0.6, risk=0.1)
    one, two = learn_exit(candidates, whole, **settings), learn_exit(changed, target, **settings)
    assert one.weights == two.weights and one.num_steps == two.num_steps
    assert one.expected != two.expected


def test_an_exit_that_agrees_by_chance_is_refused() -> None:
    candidates, whole = planted(1200, 0)
    blind = learn_exit({10: candidates[10]}, whole, depth=DEPTH, budget=0.9)
    assert blind.threshold == math.inf and blind.never
    assert re.match(
        r"refused: after 10 layers \d+ of the \d+ surest questions are given the choice of the "
        r"whole model \(\d+ %\), which is not clearly more than chance \(33 %\)",
        blind.refused,
    )
    assert blind.answers(candidates[10]) == [None] * 1200
    assert blind.expected["leave"] == 0.0 and blind.expected["steps"] == 1.0
    # chance is 1 / C of the choices that a question has
    rng = np.random.default_rng(4)
    two = [
        ChoiceScores(tuple(rng.uniform(-9, 0, 2).tolist()), (1.0,) * 2, (2, 3), (8, 8))
        for _ in range(1200)
    ]
    assert (
        "than chance (50 %)"
        in learn_exit({10: two}, two[1:] + two[:1], depth=DEPTH, budget=0.9).refused
    )
    assert learn_exit({10: two}, two, depth=DEPTH, budget=0.9).refused == ""


def test_known_answers_bound_the_loss_and_teach_nothing_else() -> None:
    candidates, whole = planted(1200, 0)
    right = [each.best for each in whole]
    settings: dict[str, Any] = dict(depth=DEPTH, budget=0.45)
    bold = learn_exit(candidates, whole, **settings, right=right)
    free = learn_exit(candidates, whole, **settings)
    assert bold.expected["lost"] == bold.expected["differ"] > 0.1, "all that changes was right"
    assert free.expected == {**bold.expected, "lost": 0.0}
    assert (free.threshold, free.weights) == (bold.threshold, bold.weights)
    careful = learn_exit(candidates, whole, **settings, loss=0.03, right=right)
    assert careful.expected["lost"] <= 0.03 and careful.expected["leave"] > 0.3
    assert careful.weights == bold.weights
    # where the whole model is never right, nothing can be lost
    never = [(each.best + 1) % 3 for each in whole]
    gains = learn_exit(candidates, whole, **settings, loss=0.03, right=never)
    assert gains.expected["leave"] == bold.expected["leave"] and gains.expected["lost"] < 0


def test_what_is_certified_nowhere_is_refused() -> None:
    """Two of five choices change, however sure the readout is, so that 1 % cannot be kept."""
    rng = np.random.default_rng(3)
    places = rng.integers(3, size=700).tolist()
    whole = [scores_of(place, 1.0) for place in places]
    shown = [place if rng.random() < 0.6 else (place + 1) % 3 for place in places]
    early = [scores_of(place, float(rng.uniform(1, 4))) for place in shown]
    found = learn_exit({5: early}, whole, depth=DEPTH, budget=0.6, risk=0.01)
    assert found.never and found.refused == (
        "no exit: 350 questions certify none within the risk and the loss at confidence 95 %"
    )
    assert not learn_exit({5: early}, whole, depth=DEPTH, budget=0.6, risk=0.4).never


def test_equally_sure_questions_leave_together_or_not_at_all() -> None:
    whole = [scores_of(0, 1.0)] * 60
    early = [scores_of(int(i % 10 == 9), 1.0) for i in range(60)]
    found = learn_exit({5: early}, whole, depth=DEPTH, budget=0.9)
    assert found.never and "equally sure" in found.refused


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
    assert found.expected["same"] > 0.99 and found.expected["leave"] > 0.6
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
    candidates, whole = planted(1200, 2)
    shares = [
        learn_exit(candidates, whole, depth=DEPTH, budget=budget).expected["leave"]
        for budget in (0.95, 0.9, 0.7)
    ]
    assert 0 < shares[0] < shares[1] < shares[2]


def test_scores_that_are_no_numbers_are_never_best() -> None:
    found = ChoiceScores((math.nan, -3.0, -math.inf), (1.0,) * 3, (1, 2, 3), (4, 4, 4))
    assert found.best == 1 and np.isfinite(found.features()).all()


@pytest.mark.parametrize(
    ("budget", "n", "match"),
    [
        (1.0, 50, "budget is 1.0"),
        (0.2, 50, "no exit after 5, 10 of 20"),
        (0.8, 19, "19 questions to learn from, and 20 are needed"),
    ],
)
def test_what_cannot_be_learned(budget: float, n: int, match: str) -> None:
    candidates, whole = planted(n, 3)
    with pytest.raises(InputError, match=match):
        learn_exit(candidates, whole, depth=DEPTH, budget=budget)


def test_too_few_questions_are_told_with_the_number_needed() -> None:
    """Of so many none is lost or changed, and the bounds are certified; of one less they are not"""
    settings: dict[str, Any] = dict(budget=0.8, risk=0.03, loss=0.01)
    with pytest.raises(InputError, match=r"700 questions to learn from, and (\d+) are needed") as e:
        check_settings(700, **settings)
    needed = int(str(e.value).split("and ")[1].split()[0])
    assert needed == 2 * least_questions(0.01, 0.05)
    check_settings(needed, **settings)
    with pytest.raises(InputError, match=f"and {needed} are needed"):
        check_settings(needed - 1, **settings)
    with pytest.raises(InputError, match="and 198 are needed"):
        check_settings(197, **{**settings, "loss": 1.0})
    for wrong in ({"risk": 0.0}, {"loss": 0.0}, {"loss": 1.5}, {"delta": 0.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is"):
            check_settings(700, **{**settings, **wrong})


def test_so_many_questions_do_where_all_choices_stay() -> None:
    whole = [scores_of(i % 3, 1 + 0.01 * i) for i in range(198)]
    found = learn_exit({5: whole}, whole, depth=DEPTH, budget=0.5, risk=0.03)
    assert not found.never and found.expected["differ"] == 0.0


def test_saved_and_loaded(tmp_path: Path) -> None:
    candidates, whole = planted(100, 4)
    made = learn_exit(candidates, whole, depth=DEPTH, budget=0.8)
    never = dataclasses.replace(made, threshold=math.inf, refused="refused: by chance")
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
        ({"tasks": {"a": {**made.to_dict(), "refused": 7}}}, "refused is 7, not a text"),
        ({"tasks": {"a": {**made.to_dict(), "refused": "why"}}}, "is refused .why. and has"),
    ):
        exits.save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
        with pytest.raises(InputError, match=told):
            EarlyExits.load(path)
    old = {name: value for name, value in made.to_dict().items() if name != "refused"}
    exits.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": {"a": old}}))
    assert EarlyExits.load(path).tasks == {"a": made}, "a file of before reasons were written"
    with pytest.raises(InputError, match="does not fit"):
        EarlyExit(4, 0.5, (1.0,), {})
