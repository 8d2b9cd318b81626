"""Learning after how many layers a question with choices may be answered, and where.

The label is whether the whole model chooses the same: no answer key is needed. Shape legend: N
questions, F features of the gate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..judge.early_exit import ChoiceScores, EarlyExit
from ..stats.calibration import sigmoid

_RIDGE = 1.0  # of weights over standardized features
_FOLDS = 5


def learn_exit(
    candidates: Mapping[int, Sequence[ChoiceScores]],
    whole: Sequence[ChoiceScores],
    *,
    depth: int,
    budget: float,
    risk: float = 1.0,
) -> EarlyExit:
    """The exit with fewest steps, not fewer than `budget` x `depth` in the mean, that changes the
    choice of at most a share `risk` of the questions; of equal ones that which changes least.

    `candidates` are scores of the N train questions after so many layers, `whole` those of all
    layers. The surest questions leave; how often these choose otherwise than the whole model is
    estimated by cross-fitting. Where none may leave, the threshold is infinite. Raises InputError
    for a budget that no candidate can keep, or too few questions.
    """
    check_settings(len(whole), budget=budget, risk=risk)
    target = np.array([each.best for each in whole])
    exits = []
    for num_steps, found in candidates.items():
        share = (1 - budget) / (1 - num_steps / depth) if num_steps < depth else math.inf
        if share <= 1:
            one = _Candidate.of(found, target, num_steps=num_steps)
            exits.append(one.exit(share, risk=risk, depth=depth))
    if not exits:
        raise InputError(
            f"no exit after {', '.join(map(str, candidates))} of {depth} layers can keep a mean of "
            f"{budget:g} of the steps; try earlier ones, or a larger budget"
        )
    return min(exits, key=lambda e: (round(e.expected["steps"], 2), e.expected["differ"]))


def check_settings(num_questions: int, *, budget: float, risk: float) -> None:
    """Raise InputError for a budget or risk out of range, or too few train questions of a task."""
    if not 0 < budget < 1:
        raise InputError(f"budget is {budget}; give a number above 0 and below 1")
    if not 0 <= risk <= 1:
        raise InputError(f"risk is {risk}; give a number from 0 to 1")
    if num_questions < 2 * _FOLDS:
        raise InputError(f"{num_questions} train questions; give at least {2 * _FOLDS}")


@dataclass(frozen=True)
class _Candidate:
    """An exit after so many layers: the gate, and of the N train questions whether their choice
    stays the `same` and how sure of that a gate is that did not see them.
    """

    num_steps: int
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    same: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(
        cls, found: Sequence[ChoiceScores], target: np.ndarray, *, num_steps: int
    ) -> "_Candidate":
        """Fit the gate, whole and for each fold."""
        features = np.stack([each.features() for each in found])
        mean, spread = features.mean(0), features.std(0)
        scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
        seen = (features - mean) * scale
        same = np.array([each.best for each in found]) == target
        fold, held_out = np.arange(len(seen)) % _FOLDS, np.empty(len(seen))
        for k in range(_FOLDS):
            weights = _regression(seen[fold != k], same[fold != k])
            held_out[fold == k] = sigmoid(seen[fold == k] @ weights[:-1] + weights[-1])
        return cls(num_steps, mean, scale, _regression(seen, same), same, held_out)

    def exit(self, share: float, *, risk: float, depth: int) -> EarlyExit:
        """Where at most this share leaves, and at most `risk` of all choose otherwise."""
        order = np.argsort(-self.held_out, kind="stable")
        changed = np.cumsum(~self.same[order]) / len(order)
        most = int(np.ceil(share * len(order)))
        # equally sure questions leave together
        last = np.append(np.diff(self.held_out[order]) != 0, True)
        allowed = np.flatnonzero((changed[:most] <= risk) & last[:most])
        count = 0 if not len(allowed) else int(allowed[-1]) + 1
        threshold = float(self.held_out[order[count - 1]]) if count else math.inf
        leaves = self.held_out >= threshold
        gone = float(leaves.mean())
        expected = {
            "leave": gone,
            "same": float(self.same[leaves].mean()) if count else 1.0,
            "differ": float((leaves & ~self.same).mean()),
            "steps": 1 - gone * (1 - self.num_steps / depth),
        }
        return EarlyExit(
            self.num_steps,
            threshold,
            tuple(self.mean.tolist()),
            tuple(self.scale.tolist()),
            tuple(self.weights.tolist()),
            expected,
        )


def _regression(seen: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Weights f64[F + 1] of a ridge logistic regression, the bias last and free, by Newton."""
    inputs = np.column_stack([seen, np.ones(len(seen))])
    ridge = np.full(inputs.shape[1], _RIDGE)
    ridge[-1] = 1e-6
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = sigmoid(inputs @ weights)
        slope = inputs.T @ (label - chance) - ridge * weights
        curve = (inputs.T * (chance * (1 - chance) + 1e-9)) @ inputs + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        weights += step
        if float(np.abs(step).max()) < 1e-9:
            break
    return weights
