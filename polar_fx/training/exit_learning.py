"""Learning after how many layers a question with choices may be answered, and where.

The label is whether the whole model chooses the same: no answer key is needed. Shape legend: N
questions, C choices, F features of a choice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..judge.early_exit import NUM_FEATURES, ChoiceScores, EarlyExit, read

_RIDGE = 1.0  # of weights over standardized features
_FOLDS = 5


def learn_exit(
    candidates: Mapping[int, Sequence[ChoiceScores]],
    whole: Sequence[ChoiceScores],
    *,
    depth: int,
    budget: float,
    risk: float = 1.0,
    loss: float = 1.0,
    right: Sequence[int] | None = None,
) -> EarlyExit:
    """The exit with fewest steps, not fewer than `budget` x `depth` in the mean, that changes the
    choice of at most a share `risk` of the questions; of equal ones that which changes least.

    Where the places of the `right` choices are known, it also gives at most a share `loss` fewer
    right answers than the whole model. They teach nothing else.

    `candidates` are scores of the N train questions after so many layers, `whole` those of all
    layers. The surest questions leave; how often these choose otherwise than the whole model is
    estimated by cross-fitting. Where none may leave, the threshold is infinite. Raises InputError
    for a budget that no candidate can keep, or too few questions.
    """
    check_settings(len(whole), budget=budget, risk=risk, loss=loss)
    target = np.array([each.best for each in whole])
    key = None if right is None else np.array(right)
    exits = []
    for num_steps, found in candidates.items():
        share = (1 - budget) / (1 - num_steps / depth) if num_steps < depth else math.inf
        if share <= 1:
            one = _Candidate.of(found, target, num_steps=num_steps, key=key)
            exits.append(one.exit(share, risk=risk, loss=loss, depth=depth))
    if not exits:
        raise InputError(
            f"no exit after {', '.join(map(str, candidates))} of {depth} layers can keep a mean of "
            f"{budget:g} of the steps; try earlier ones, or a larger budget"
        )
    return min(exits, key=lambda e: (round(e.expected["steps"], 2), e.expected["differ"]))


def check_settings(num_questions: int, *, budget: float, risk: float, loss: float) -> None:
    """Raise InputError for a budget, risk or loss out of range, or too few train questions of a
    task.
    """
    if not 0 < budget < 1:
        raise InputError(f"budget is {budget}; give a number above 0 and below 1")
    if not 0 <= risk <= 1:
        raise InputError(f"risk is {risk}; give a number from 0 to 1")
    if not 0 <= loss <= 1:
        raise InputError(f"loss is {loss}; give a number from 0 to 1")
    if num_questions < 2 * _FOLDS:
        raise InputError(f"{num_questions} train questions; give at least {2 * _FOLDS}")


@dataclass(frozen=True)
class _Candidate:
    """An exit after so many layers: its readout, and of the N train questions, by one that did not
    see them, whether their choice stays the `same`, how sure it is of that, and what it `loses` (1:
    a right answer of the whole model; -1: it has one that the whole model has not; 0: neither, or
    not known).
    """

    num_steps: int
    weights: np.ndarray
    same: np.ndarray
    held_out: np.ndarray
    loses: np.ndarray

    @classmethod
    def of(
        cls,
        found: Sequence[ChoiceScores],
        target: np.ndarray,
        *,
        num_steps: int,
        key: np.ndarray | None,
    ) -> "_Candidate":
        """Fit the readout, whole and for each fold."""
        fold = np.arange(len(found)) % _FOLDS
        chosen, held_out = np.empty(len(found), dtype=int), np.empty(len(found))
        for k in range(_FOLDS):
            seen, others = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            weights = learn_readout([found[i] for i in seen.tolist()], target[seen])
            told = read(weights, [found[i] for i in others.tolist()])
            chosen[others], held_out[others] = told.place, told.sureness
        loses = np.zeros(len(found), dtype=int)
        if key is not None:
            loses = (target == key).astype(int) - (chosen == key)
        return cls(num_steps, learn_readout(found, target), chosen == target, held_out, loses)

    def exit(self, share: float, *, risk: float, loss: float, depth: int) -> EarlyExit:
        """Where at most this share leaves, at most `risk` of all choose otherwise, and at most
        `loss` of all are lost.
        """
        order = np.argsort(-self.held_out, kind="stable")
        changed = np.cumsum(~self.same[order]) / len(order)
        lost = np.cumsum(self.loses[order]) / len(order)
        most = int(np.ceil(share * len(order)))
        # equally sure questions leave together
        last = np.append(np.diff(self.held_out[order]) != 0, True)
        allowed = np.flatnonzero(((changed <= risk) & (lost <= loss) & last)[:most])
        count = 0 if not len(allowed) else int(allowed[-1]) + 1
        threshold = float(self.held_out[order[count - 1]]) if count else math.inf
        leaves = self.held_out >= threshold
        gone = float(leaves.mean())
        expected = {
            "leave": gone,
            "same": float(self.same[leaves].mean()) if count else 1.0,
            "differ": float((leaves & ~self.same).mean()),
            "lost": float((leaves * self.loses).mean()),
            "steps": 1 - gone * (1 - self.num_steps / depth),
        }
        return EarlyExit(self.num_steps, threshold, tuple(self.weights.tolist()), expected)


def learn_readout(found: Sequence[ChoiceScores], target: np.ndarray) -> np.ndarray:
    """Weights f64[F] of a conditional logit that tells the choices `target` i64[N] of the whole
    model (McFadden 1974), with a ridge over standardized features, by Newton.
    """
    most = max(len(each.scores) for each in found)
    seen = np.zeros((len(found), most, NUM_FEATURES))
    there = np.zeros((len(found), most), dtype=bool)
    for i, each in enumerate(found):
        seen[i, : len(each.scores)], there[i, : len(each.scores)] = each.features(), True
    spread = seen[there].std(0)
    scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
    seen = seen * scale
    own = seen[np.arange(len(found)), target]
    weights = np.zeros(NUM_FEATURES)
    loss, shares = _loss(weights, seen, there=there, own=own)
    for _ in range(100):
        mean = np.einsum("nc,ncf->nf", shares, seen)
        slope = (own - mean).sum(0) - _RIDGE * weights
        spreads = np.einsum("nc,ncf,ncg->fg", shares, seen, seen) - mean.T @ mean
        step = np.linalg.solve(spreads + _RIDGE * np.eye(NUM_FEATURES), slope)
        # a full step may go too far where shares are near 0 or 1; the loss is convex
        while True:
            tried, shares = _loss(weights + step, seen, there=there, own=own)
            if tried <= loss or float(np.abs(step).max()) < 1e-9:
                break
            step = step / 2
        weights, loss = weights + step, tried
        if float(np.abs(step).max()) < 1e-9:
            break
    return weights * scale


def _loss(
    weights: np.ndarray, seen: np.ndarray, *, there: np.ndarray, own: np.ndarray
) -> tuple[float, np.ndarray]:
    """The penalized negative log-likelihood of the targets' features `own` f64[N, F], and the share
    of each choice f64[N, C].
    """
    utility = np.where(there, seen @ weights, -np.inf)
    top = utility.max(1, keepdims=True)
    exps = np.exp(utility - top)
    total = exps.sum(1, keepdims=True)
    log_of_own = own @ weights - top[:, 0] - np.log(total[:, 0])
    return float(-log_of_own.sum() + _RIDGE / 2 * weights @ weights), exps / total
