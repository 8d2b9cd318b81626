"""Dense labels, mining of menus, training and calibration of selectors, on data with a known best
answer.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polar_fx.errors import InputError
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.policy import Policy
from polar_fx.predictor.selector import SelectorNetwork
from polar_fx.training.pipeline import TrainingConfig, fit
from polar_fx.training.selector_training import (
    Labels,
    SelectorConfig,
    choose_all,
    price_of,
    train_selector,
)
from training_samples import DEPTH, A, B


def planted(n: int, seed: int, *, flip: float = 0.1) -> Labels:
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
    selector, measured = fit(menu, planted(600, 0), validation=planted(600, 1), config=CONFIG)
    test = planted(1000, 2)
    chances = selector.probabilities(test.features)
    chosen = choose_all(chances, menu.steps, depth=DEPTH, threshold=selector.calibration.threshold)
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
            planted_chances(selector),
            menu.steps,
            depth=DEPTH,
            threshold=-np.inf,
            price=selector.calibration.prices[0.8],
        )
    ].mean()
    assert mean <= 0.8 * DEPTH
    again, same = fit(menu, planted(600, 0), validation=planted(600, 1), config=CONFIG)
    assert np.array_equal(again.probabilities(test.features), chances) and same == measured


@pytest.mark.parametrize("width", [0, 16])
def test_the_mean_of_networks_is_one_network(width: int) -> None:
    config = SelectorConfig(width=width, epochs=3, learning_rate=0.01)
    parts = [
        train_selector(
            planted(200, 0), planted(200, 1), config=replace(config, networks=1, seed=s)
        )[0]
        for s in (5, 1005, 2005)
    ]
    epochs: list[int] = []
    whole, told = train_selector(
        planted(200, 0),
        planted(200, 1),
        config=replace(config, networks=3, seed=5),
        progress=lambda epoch, _: epochs.append(epoch),
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

    selector, measured = fit(Menu.of([A, B]), noise(400), validation=noise(400), config=CONFIG)
    test = noise(2000)
    chosen = choose_all(
        selector.probabilities(test.features),
        selector.menu.steps,
        depth=DEPTH,
        threshold=selector.calibration.threshold,
    )
    lost = test.right[:, 0].mean() - test.right[np.arange(2000), chosen].mean()
    assert (
        lost < 0.02
        and measured["validation"]["accuracy"]["accuracy"]
        >= measured["validation"]["identity"]["accuracy"] - 0.01
    )


def of_two_tasks(n: int, seed: int) -> Labels:
    """Questions of two tasks, told apart by the third feature: A gains on one, and loses on the
    other, where the first feature promises the same.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    adding = rng.random(n) < 0.5
    x[:, 2] = np.where(adding, 6, -6) + rng.normal(size=n)
    right = np.stack(
        [rng.random(n) < 0.3, rng.random(n) < np.where(adding, 0.8, 0.2), rng.random(n) < 0.1], 1
    )
    tasks = ["add" if each else "mul" for each in adding]
    features = torch.tensor(x, dtype=torch.float32)
    return Labels(features, right, np.where(right, -0.2, -2.0), tasks)


def test_each_task_has_a_threshold_that_holds_for_it() -> None:
    menu = Menu.of([A, B])
    blind = replace(CONFIG, selector=replace(CONFIG.selector, epochs=1, learning_rate=1e-6))
    selector, measured = fit(
        menu, of_two_tasks(800, 0), validation=of_two_tasks(1600, 1), config=blind
    )
    # a network that learned nothing proposes A everywhere, and for all together that is a gain
    calibration = selector.calibration
    assert calibration.threshold <= 0.2 and calibration.by_task["mul"] == math.inf
    assert calibration.by_task["add"] <= 0.2
    test = of_two_tasks(2000, 2)
    chosen = [Policy("accuracy").choose(p, calibration) for p in selector.proposals(test.features)]
    of_mul = np.array([task == "mul" for task in test.tasks])
    assert not np.array(chosen)[of_mul].any() and np.array(chosen)[~of_mul].all()
    assert set(measured["threshold_by_task"]) == {"add", "mul"}
    accuracy = measured["validation"]["accuracy"]["accuracy"]
    assert accuracy > measured["validation"]["identity"]["accuracy"] + 0.15


@pytest.mark.parametrize("rare", [0, 1, 2])
def test_a_task_with_hardly_a_validation_question_runs_the_identity(rare: int) -> None:
    train, validation = of_two_tasks(400, 0), of_two_tasks(400, 1)
    of_mul = [i for i, task in enumerate(validation.tasks) if task == "mul"]
    kept = [i for i in range(400) if i not in of_mul[rare:]]
    few = validation.at(np.array(kept))
    blind = replace(CONFIG, selector=replace(CONFIG.selector, epochs=1, learning_rate=1e-6))
    calibration = fit(Menu.of([A, B]), train, validation=few, config=blind)[0].calibration
    assert calibration.threshold_for("mul") == math.inf > calibration.threshold_for("add")


def test_labels_name_a_task_for_each_question_or_none() -> None:
    labels = of_two_tasks(10, 0)
    part = labels.at(np.array([3, 1]))
    assert part.tasks == [labels.tasks[3], labels.tasks[1]] and len(part.features) == 2
    with pytest.raises(InputError, match="9 tasks are named for 10 questions"):
        replace(labels, tasks=labels.tasks[1:])


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
        price_of(chances, steps, depth=DEPTH, budget=0.5) is None
        and price_of(chances, steps, depth=DEPTH, budget=0.4) is None
    ), "out of reach"
    for budget in (1.2, 1.0, 0.8, 0.6, 0.55):
        price = price_of(chances, steps, depth=DEPTH, budget=budget)
        assert price is not None and price >= last
        assert (
            steps[choose_all(chances, steps, depth=DEPTH, threshold=-np.inf, price=price)].mean()
            <= budget * DEPTH + 1e-9
        )
        if price > 1e-6:
            lower = choose_all(chances, steps, depth=DEPTH, threshold=-np.inf, price=price - 1e-6)
            assert steps[lower].mean() > budget * DEPTH
        last = price


def labels_of(right: np.ndarray) -> tuple[Labels, Labels]:
    """Labels for training and validation, the same ones, of bool[N, K]."""
    same = Labels(torch.zeros(len(right), 2), right, np.zeros(right.shape))
    return same, same


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
            lambda: train_selector(*labels_of(np.zeros((3, 2), bool))),
            "wrong on all 3",
        ),
        (
            lambda: train_selector(*labels_of(np.ones((3, 2), bool))),
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
