"""Learning after how many layers a question with choices may be answered, and where.

The label is whether the whole model chooses the same: no answer key is needed. Shape legend: N
questions, F features of the gate.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..judge.early_exit import ChoiceScores, EarlyExit, logistic

_RIDGE = 1.0  # of weights over standardized features
_FOLDS = 5


def learn_exit(
    candidates: Mapping[int, Sequence[ChoiceScores]],
    whole: Sequence[ChoiceScores],
    *,
    depth: int,
    budget: float,
) -> EarlyExit:
    """The exit that differs least from the whole model at a mean of `budget` x `depth` steps.

    `candidates` are scores of the N train questions after so many layers, `whole` those of all
    layers. Of each candidate, as many of the surest questions leave as the budget needs; how
    often these choose as the whole model does is estimated by cross-fitting. Raises InputError for
    a budget that no candidate can keep, or too few questions.
    """
    if not 0 < budget < 1:
        raise InputError(f"a budget of {budget} of the steps; give a fraction between 0 and 1")
    if len(whole) < 2 * _FOLDS:
        raise InputError(f"{len(whole)} train questions; give at least {2 * _FOLDS}")
    target = np.array([each.best for each in whole])
    exits = []
    for num_steps, found in candidates.items():
        share = (1 - budget) / (1 - num_steps / depth) if num_steps < depth else math.inf
        if share <= 1:
            exits.append(_learn_one(found, target, num_steps=num_steps, share=share, depth=depth))
    if not exits:
        raise InputError(
            f"no exit after {', '.join(map(str, candidates))} of {depth} layers can keep a mean of "
            f"{budget:g} of the steps; try earlier ones, or a larger budget"
        )
    return min(exits, key=lambda each: each.expected["differ"])


def _learn_one(
    found: Sequence[ChoiceScores],
    target: np.ndarray,
    *,
    num_steps: int,
    share: float,
    depth: int,
) -> EarlyExit:
    """The exit after so many layers at which this share of the questions leaves."""
    features = np.stack([each.features() for each in found])
    mean, spread = features.mean(0), features.std(0)
    scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
    seen = (features - mean) * scale
    same = np.array([each.best for each in found]) == target
    fold, held_out = np.arange(len(seen)) % _FOLDS, np.empty(len(seen))
    for k in range(_FOLDS):
        weights = _regression(seen[fold != k], same[fold != k])
        held_out[fold == k] = logistic(seen[fold == k] @ weights[:-1] + weights[-1])
    threshold = float(np.quantile(held_out, 1 - share))
    leaves = held_out >= threshold
    expected = {
        "leave": float(leaves.mean()),
        "same": float(same[leaves].mean()),
        "differ": float((leaves & ~same).mean()),
        "steps": 1 - float(leaves.mean()) * (1 - num_steps / depth),
    }
    weights = _regression(seen, same)
    return EarlyExit(
        num_steps,
        threshold,
        tuple(mean.tolist()),
        tuple(scale.tolist()),
        tuple(weights.tolist()),
        expected,
    )


def _regression(seen: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Weights f64[F + 1] of a ridge logistic regression, the bias last and free, by Newton."""
    inputs = np.column_stack([seen, np.ones(len(seen))])
    ridge = np.full(inputs.shape[1], _RIDGE)
    ridge[-1] = 1e-6
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = logistic(inputs @ weights)
        slope = inputs.T @ (label - chance) - ridge * weights
        curve = (inputs.T * (chance * (1 - chance) + 1e-9)) @ inputs + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        weights += step
        if float(np.abs(step).max()) < 1e-9:
            break
    return weights
