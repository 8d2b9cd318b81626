"""Training a menu selector: P(program answers right | input), calibrated on validation questions.

Every program of the menu is a label of its own (binary cross-entropy), so no class has to win: an
input may be answered by all programs or by none. The bias starts at the base rates, which is the
best answer of a network that sees nothing; what is learned beyond has to lower the validation loss.

Shape legend: N questions, F features, K programs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, TrainingError
from ..predictor.selector import SelectorNetwork
from .early_stopping import Progress, check_ranges, train_to_best


@dataclass(frozen=True)
class SelectorConfig:
    """How a selector is trained. Raises InputError on a value out of range.

    `networks` of them are trained from different beginnings, and their mean is used.
    `likelihood_weight` mixes the probability of the accepted answer into the 0/1 label (0: the
    label alone): it says how close a program came, and does not flip with numerics.
    """

    width: int = 64
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    batch: int = 128
    epochs: int = 200
    patience: int = 20
    likelihood_weight: float = 0.0
    networks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "selector training",
            ranges={
                "width": (0, 1 << 16),
                "dropout": (0, 0.95),
                "learning_rate": (1e-8, 1),
                "weight_decay": (0, 10),
                "batch": (1, 1 << 20),
                "epochs": (1, 1 << 20),
                "patience": (1, 1 << 20),
                "likelihood_weight": (0, 1),
                "networks": (1, 64),
            },
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """`features` f32[N, F], `right` bool[N, K], `log_likelihood` f64[N, K]; `tasks` names the task
    of each question, or is empty where none is told from another.

    Raises InputError if they do not fit each other, or features are not finite.
    """

    features: Tensor
    right: np.ndarray
    log_likelihood: np.ndarray
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.features) != len(self.right) or self.right.shape != self.log_likelihood.shape:
            raise InputError(
                f"{tuple(self.features.shape)} features, {self.right.shape} labels and "
                f"{self.log_likelihood.shape} likelihoods do not fit; give one row a question"
            )
        if self.tasks and len(self.tasks) != len(self.features):
            raise InputError(
                f"{len(self.tasks)} tasks are named for {len(self.features)} questions; name one "
                "for each, or none"
            )
        if not len(self.features):
            raise TrainingError("there is no labelled question; train on at least one")
        if not bool(torch.isfinite(self.features).all()):
            row = int((~torch.isfinite(self.features)).any(1).nonzero()[0])
            raise InputError(
                f"the features of question number {row} are not finite; leave it out, or train in "
                "another dtype"
            )

    def at(self, places: np.ndarray) -> "Labels":
        """Some of the questions, by their places i64[M]."""
        return Labels(
            self.features[torch.tensor(places)],
            self.right[places],
            self.log_likelihood[places],
            [self.tasks[int(i)] for i in places] if self.tasks else (),
        )

    def targets(self, likelihood_weight: float) -> Tensor:
        """f32[N, K] in 0..1."""
        target = self.right.astype(np.float64)
        if likelihood_weight:
            if np.isnan(self.log_likelihood).any():
                raise InputError(
                    "likelihood_weight needs teacher-forced verdicts; use 0 with generated answers"
                )
            target = (1 - likelihood_weight) * target + likelihood_weight * np.exp(
                self.log_likelihood
            )
        return torch.tensor(target, dtype=torch.float32)


def train_selector(
    train: Labels,
    validation: Labels,
    *,
    config: SelectorConfig = SelectorConfig(),
    progress: Progress | None = None,
) -> tuple[SelectorNetwork, dict[str, Any]]:
    """The mean of networks, each of the epoch with its lowest validation loss, and their histories.

    Deterministic for a seed. `progress(epoch, losses)` is called after each epoch, counted over all
    networks. Raises TrainingError if no program is right on any train question, or every one on
    all: there is nothing to choose from.
    """
    if train.right.all() or not train.right.any():
        what = "right" if train.right.any() else "wrong"
        raise TrainingError(
            f"every program is {what} on all {len(train.right)} train questions: nothing can be "
            "learned; ask others"
        )
    epochs = count(1)

    def note(_: int, losses: dict[str, float]) -> None:
        if progress is not None:
            progress(next(epochs), losses)

    seeds = [config.seed + 1000 * member for member in range(config.networks)]
    networks, histories = zip(
        *[
            _train_one(train, validation, config=replace(config, seed=s), progress=note)
            for s in seeds
        ],
        strict=True,
    )
    return SelectorNetwork.mean_of(networks), {
        "config": asdict(config),
        "networks": list(histories),
        "base_rate_loss": histories[0]["history"][0]["validation"],
    }


def _train_one(
    train: Labels, validation: Labels, *, config: SelectorConfig, progress: Progress
) -> tuple[SelectorNetwork, dict[str, Any]]:
    target, held_out = (
        train.targets(config.likelihood_weight),
        torch.tensor(validation.right, dtype=torch.float32),
    )
    loss_of = torch.nn.BCEWithLogitsLoss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = SelectorNetwork(
            train.features.shape[1],
            train.right.shape[1],
            width=config.width,
            dropout=config.dropout,
        )
        network.start_from(train.features, torch.tensor(train.right.mean(0), dtype=torch.float32))
        history = train_to_best(
            network,
            len(target),
            loss_of=lambda part: loss_of(network(train.features[part]), target[part]),
            validation_loss=lambda: float(loss_of(network(validation.features), held_out)),
            config=config,
            progress=progress,
        )
    return network, history


def choose_all(
    probabilities: np.ndarray,
    steps: np.ndarray,
    *,
    depth: int,
    threshold: float | np.ndarray,
    price: float = 0.0,
) -> np.ndarray:
    """What each row of f64[N, K] would run at this price for steps, i64[N]: as `Policy` chooses,
    for all rows at once. `threshold` is one for all, or f64[N].
    """
    scores = probabilities - price * steps / depth
    ties = scores == scores.max(1, keepdims=True)
    best = np.where(ties, steps, np.inf).argmin(1)
    gain = np.take_along_axis(scores, best[:, None], 1)[:, 0] - scores[:, 0]
    return np.where(gain >= threshold, best, 0)


def price_of(
    probabilities: np.ndarray, steps: np.ndarray, *, depth: int, budget: float
) -> float | None:
    """The lowest price for steps at which the mean of those chosen is at most `budget` x depth;
    found by bisection.

    None if no program is short enough, or only always running the shortest would do.
    """
    if steps.min() >= budget * depth:
        return None

    def mean_steps(price: float) -> float:
        return float(
            steps[
                choose_all(probabilities, steps, depth=depth, threshold=-np.inf, price=price)
            ].mean()
        )

    low, high = 0.0, 1.0
    if mean_steps(low) <= budget * depth:
        return low
    while mean_steps(high) > budget * depth:  # a price beyond any probability chooses the shortest
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_steps(middle) <= budget * depth else (middle, high)
    return high
