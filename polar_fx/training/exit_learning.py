"""Learning after how many layers a question with choices may be answered, and where.

The label is whether the whole model chooses the same: no answer key is needed. Half of the
questions choose depth and readout, the other half bound what may change and be lost, so the bounds
count the choice. Shape legend: N questions, C choices, F features of a choice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..judge.early_exit import NUM_FEATURES, ChoiceScores, EarlyExit, read
from ..stats.risk import NUISANCE, binomial_cdf, least_questions, risk_p_value

DELTA = 0.05  # how often a bound may fail
_SEED = 0  # of the halves
_RIDGE = 1.0  # of weights over standardized features
_FOLDS = 5
_THRESHOLDS = 100  # that are tested at most, from the surest questions on


def learn_exit(
    candidates: Mapping[int, Sequence[ChoiceScores]],
    whole: Sequence[ChoiceScores],
    *,
    depth: int,
    budget: float,
    risk: float = 1.0,
    loss: float = 1.0,
    right: Sequence[int] | None = None,
    delta: float = DELTA,
) -> EarlyExit:
    """The exit with fewest steps that changes the choice of at most a share `risk` of all
    questions; of equal ones that which changes least. Where the places of the `right` choices are
    known, it also gives at most a share `loss` fewer right answers than the whole model. They teach
    nothing else.

    `candidates` are scores of the N questions after so many layers, `whole` those of all layers.
    One half, drawn with a fixed seed, chooses depth and readout by cross-fitting: of it no more
    leave than keep the mean at `budget` x `depth` steps or more. On the other half thresholds are
    tested from the surest questions on until one fails (Learn then Test, arXiv 2110.01052), so
    that both bounds hold together with probability 1 - `delta` over its draw.

    An exit is refused, with its threshold infinite and the reason in `refused`, where no threshold
    keeps the bounds, or where the questions that the budget lets leave are not clearly (one-sided
    binomial test at `delta`) given the choice of the whole model more often than 1 in C. Raises
    InputError for settings out of range, too few questions, or a budget that no candidate can keep.
    """
    bounded = loss if right is not None else 1.0  # no answers, no bound of what is lost
    check_settings(len(whole), budget=budget, risk=risk, loss=bounded, delta=delta)
    target = np.array([each.best for each in whole])
    key = None if right is None else np.array(right)
    order = np.random.default_rng(_SEED).permutation(len(whole))
    choosing, bounding = np.sort(order[: len(whole) // 2]), np.sort(order[len(whole) // 2 :])
    chosen: list[_Candidate] = []
    for num_steps, found in candidates.items():
        share = (1 - budget) / (1 - num_steps / depth) if num_steps < depth else math.inf
        if share <= 1:
            half = _Half.of(found, target, key=key, places=choosing)
            chosen.append(_Candidate.of(half, num_steps, share=share, saved=1 - num_steps / depth))
    if not chosen:
        raise InputError(
            f"no exit after {', '.join(map(str, candidates))} of {depth} layers can keep a mean of "
            f"{budget:g} of the steps; try earlier ones, or a larger budget"
        )
    best = min(chosen, key=lambda each: each.rank(risk, bounded))
    half = _Half.of(candidates[best.num_steps], target, key=key, places=bounding)
    return best.bounded_on(half, risk=risk, loss=bounded, delta=delta)


def check_settings(
    num_questions: int, *, budget: float, risk: float, loss: float, delta: float = DELTA
) -> None:
    """Raise InputError for a budget, risk, loss or delta out of range, or too few questions of a
    task, train and validation ones together, naming how many are needed.
    """
    if not 0 < budget < 1:
        raise InputError(f"budget is {budget}; give a number above 0 and below 1")
    for name, value in (("risk", risk), ("loss", loss)):
        if not 0 < value <= 1:
            raise InputError(f"{name} is {value}; give a number above 0, and at most 1")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}; give a number above 0 and below 1")
    bounding = 0 if risk == 1 else math.ceil(math.log(delta) / math.log1p(-risk))
    if loss < risk:
        bounding = max(bounding, least_questions(loss, delta))
    needed = 2 * max(2 * _FOLDS, bounding)
    if num_questions < needed:
        raise InputError(
            f"{num_questions} questions to learn from, and {needed} are needed: half of them "
            f"choose the exit, and the others must show that at most {100 * risk:g} % of all "
            f"choices change and right answers are lost on {100 * loss:g} % of all questions, at "
            f"confidence {100 * (1 - delta):g} %; give more of them, or a larger risk or loss"
        )


@dataclass(frozen=True)
class _Half:
    """What is known of N of the questions at an exit: their scores there, the choices of the whole
    model i64[N], and the right ones i64[N] (None: not known).
    """

    found: list[ChoiceScores]
    target: np.ndarray
    key: np.ndarray | None

    @classmethod
    def of(
        cls,
        found: Sequence[ChoiceScores],
        target: np.ndarray,
        *,
        key: np.ndarray | None,
        places: np.ndarray,
    ) -> "_Half":
        """Of the questions at these places, i64[N]."""
        some = [found[i] for i in places.tolist()]
        return cls(some, target[places], None if key is None else key[places])

    def told(self, place: np.ndarray, sureness: np.ndarray) -> "_Told":
        """What leaving with these choices i64[N], so sure f64[N], would come to."""
        loses = np.zeros(len(place), dtype=int)
        if self.key is not None:
            loses = (self.target == self.key).astype(int) - (place == self.key)
        return _Told(sureness, place == self.target, loses)


@dataclass(frozen=True)
class _Told:
    """Of N questions how sure a readout is f64[N], whether their choice stays the `same` bool[N],
    and what they lose i64[N] (1: a right answer of the whole model; -1: they gain one; 0: neither,
    or not known).
    """

    sureness: np.ndarray
    same: np.ndarray
    loses: np.ndarray

    def shares(self, threshold: float, *, saved: float) -> dict[str, float]:
        """What `EarlyExit.expected` holds; `saved` of the steps is what leaving saves."""
        leaves = self.sureness >= threshold
        gone = float(leaves.mean())
        return {
            "leave": gone,
            "same": float(self.same[leaves].mean()) if gone else 1.0,
            "differ": float((leaves & ~self.same).mean()),
            "lost": float((leaves * self.loses).mean()),
            "steps": 1 - gone * saved,
            "questions": float(len(leaves)),
        }

    def p_value(self, threshold: float, *, risk: float, loss: float, delta: float) -> float:
        """Of "more than `risk` change, or more than `loss` are lost": the larger of both, valid
        whichever of them is true.
        """
        leaves, n = self.sureness >= threshold, len(self.same)
        changes = binomial_cdf(int((leaves & ~self.same).sum()), n, p=risk) if risk < 1 else 0.0
        if loss >= risk:  # no more can be lost than change
            return changes
        gained = int((leaves & (self.loses < 0)).sum())
        lost = int((leaves & (self.loses > 0)).sum())
        slack = NUISANCE * delta
        return max(changes, risk_p_value(gained, lost, n=n, epsilon=loss, slack=slack))


@dataclass(frozen=True)
class _Candidate:
    """An exit after so many layers, which saves a share `saved` of the steps: its readout, the
    thresholds on it that the budget allows, from the largest on, and what readouts that did not see
    them tell of the questions that choose, with such thresholds on these (`tried`).
    """

    num_steps: int
    saved: float
    weights: np.ndarray
    thresholds: list[float]
    told: _Told
    tried: list[float]

    @classmethod
    def of(cls, half: _Half, num_steps: int, *, share: float, saved: float) -> "_Candidate":
        """Fit the readout, whole and for each fold; at most this share leaves."""
        fold = np.arange(len(half.found)) % _FOLDS
        place, sureness = np.empty(len(fold), dtype=int), np.empty(len(fold))
        for k in range(_FOLDS):
            seen, others = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            weights = learn_readout([half.found[i] for i in seen.tolist()], half.target[seen])
            found = read(weights, [half.found[i] for i in others.tolist()])
            place[others], sureness[others] = found.place, found.sureness
        weights = learn_readout(half.found, half.target)
        own = _thresholds(read(weights, half.found).sureness, share)
        told, tried = half.told(place, sureness), _thresholds(sureness, share)
        return cls(num_steps, saved, weights, own, told, tried)

    def rank(self, risk: float, loss: float) -> tuple[float, float]:
        """Steps and changed choices where it keeps within both bounds, as far as it is known."""
        found = self.told.shares(math.inf, saved=self.saved)
        for threshold in self.tried:
            shares = self.told.shares(threshold, saved=self.saved)
            if shares["differ"] <= risk and shares["lost"] <= loss:
                found = shares
        return round(found["steps"], 2), found["differ"]

    def bounded_on(self, half: _Half, *, risk: float, loss: float, delta: float) -> EarlyExit:
        """The exit at the least threshold that the other questions certify, or refused."""
        found = read(self.weights, half.found)
        told = half.told(found.place, found.sureness)
        threshold, refused = math.inf, ""
        if not self.thresholds:
            refused = "no exit: too many questions are equally sure to leave within the budget"
        else:
            refused = self._by_chance(told, half, delta=delta)
        if not refused:
            for tried in self.thresholds:
                if told.p_value(tried, risk=risk, loss=loss, delta=delta) > delta:
                    break
                threshold = tried
            if math.isinf(threshold):
                refused = (
                    f"no exit: {len(half.found)} questions certify none within the risk and the "
                    f"loss at confidence {100 * (1 - delta):g} %"
                )
        expected = told.shares(threshold, saved=self.saved)
        weights = tuple(self.weights.tolist())
        return EarlyExit(self.num_steps, threshold, weights, expected, refused)

    def _by_chance(self, told: _Told, half: _Half, *, delta: float) -> str:
        """Why the exit is refused if those that the budget lets leave choose as the whole model
        does no more often than by chance, as far as it is certain; else empty.
        """
        surest = np.flatnonzero(told.sureness >= self.thresholds[-1])
        if not len(surest):
            return f"no exit: none of {len(half.found)} questions is sure enough to leave"
        n, same = len(surest), int(told.same[surest].sum())
        chance = float(np.mean([1 / len(half.found[i].scores) for i in surest.tolist()]))
        # P(n questions choose the same at least as often by chance)
        if binomial_cdf(n - same, n, p=1 - chance) <= delta:
            return ""
        return (
            f"refused: after {self.num_steps} layers {same} of the {n} surest questions are given "
            f"the choice of the whole model ({100 * same / n:.0f} %), which is not clearly more "
            f"than chance ({100 * chance:.0f} %)"
        )


def _thresholds(sureness: np.ndarray, share: float) -> list[float]:
    """Where at most this share of the questions leaves, of sureness f64[N], from the largest on.

    Equally sure questions leave together.
    """
    ordered = -np.sort(-sureness)
    most = math.floor(share * len(ordered) + 1e-9)
    last = np.append(np.diff(ordered) != 0, True)
    allowed = np.flatnonzero(last[:most])
    if not len(allowed):
        return []
    some = np.linspace(0, len(allowed) - 1, min(_THRESHOLDS, len(allowed))).round().astype(int)
    return ordered[allowed[np.unique(some)]].tolist()


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
