"""How far to believe predicted probabilities, and when to leave the identity: reliability, scaling, a threshold for risk."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..search.intervals import Share
from .paired import flags, numbers

BINNINGS = ("mass", "width")
THRESHOLDS = tuple(round(0.5 - 0.02 * i, 2) for i in range(26))  # predicted gains from 0.5 down to 0
_FLOOR = 1e-12  # a certain miss costs 27.6 nats in the log loss, not infinitely many
_NUISANCE = 0.25  # part of delta spent on the bound of the discordance
_NEWTON_STEPS = 100


# ------------------------------------------------------------------------------------------------------ reliability


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions that lie together: their range, their mean, and how often they came true."""

    low: float
    high: float
    mean: float
    outcomes: Share

    def to_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "mean": self.mean, "outcomes": self.outcomes.to_dict()}


@dataclass(frozen=True, slots=True)
class Reliability:
    """Bins, without empty ones, in rising order; made by `reliability`."""

    bins: tuple[Bin, ...]
    n: int

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |share that came true - mean prediction| over the bins, weighted by count, 0 to 1."""
        gaps = (b.outcomes.n * abs(b.outcomes.count / b.outcomes.n - b.mean) for b in self.bins)
        return math.fsum(gaps) / self.n

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"n": self.n, "ece": self.ece, "bins": [each.to_dict() for each in self.bins]}


def reliability(probabilities: Any, outcomes: Any, *, bins: int = 10, equal: str = "mass") -> Reliability:
    """Bins of predictions [N] or [N, K] against what came true, {0, 1} of the same shape.

    equal: "mass" puts as many predictions into each bin, as far as equal ones, which stay together, allow; "width" cuts 0..1
    into equal parts. Equal mass is the less biased (Roelofs et al., arXiv 2012.08668). Raises InputError.
    """
    p, y = _predictions(probabilities, outcomes)
    if bins < 1:
        raise InputError(f"{bins} bins; give at least one")
    if equal not in BINNINGS:
        raise InputError(f"unknown binning {equal!r}; use one of {', '.join(BINNINGS)}")
    inner = np.arange(1, bins)
    cuts = np.unique(np.sort(p)[len(p) * inner // bins]) if equal == "mass" else inner / bins
    which = np.searchsorted(cuts, p, side="right")  # a prediction at a cut belongs above it
    found = []
    for index in np.unique(which):
        inside = which == index
        low, high = (p[inside].min(), p[inside].max()) if equal == "mass" else (index / bins, (index + 1) / bins)
        share = Share(int(y[inside].sum()), int(inside.sum()))
        found.append(Bin(float(low), float(high), float(p[inside].mean()), share))
    return Reliability(tuple(found), len(p))


def ece(probabilities: Any, outcomes: Any, *, bins: int = 10, equal: str = "mass") -> float:
    """`Reliability.ece` of predictions [N] or [N, K]."""
    return reliability(probabilities, outcomes, bins=bins, equal=equal).ece


def brier(probabilities: Any, outcomes: Any) -> float:
    """Mean squared difference of predictions [N] or [N, K] and outcomes; 0 is best, 0.25 what a constant 1/2 has."""
    p, y = _predictions(probabilities, outcomes)
    return float(((p - y) ** 2).mean())


def log_loss(probabilities: Any, outcomes: Any) -> float:
    """Mean negative log-likelihood of outcomes, in nats; predictions are kept 1e-12 away from 0 and 1, so it is finite."""
    p, y = _predictions(probabilities, outcomes)
    p = np.clip(p, _FLOOR, 1 - _FLOOR)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def _flat(name: str, values: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    array = np.asarray(values)
    if array.ndim not in (1, 2):
        raise InputError(f"{name} has shape {list(array.shape)}; give [N] or [N, K]")
    return numbers(name, array.ravel()), array.shape


def _outcomes(outcomes: Any, of: str, shape: tuple[int, ...]) -> np.ndarray:
    y, own = _flat("outcomes", outcomes)
    if own != shape:
        raise InputError(f"outcomes have shape {list(own)} and {of} {list(shape)}; give one outcome each")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError(f"outcomes hold {y[~np.isin(y, (0.0, 1.0))][0]:g}; give 0 and 1, or booleans")
    return y


def _predictions(probabilities: Any, outcomes: Any) -> tuple[np.ndarray, np.ndarray]:
    p, shape = _flat("probabilities", probabilities)
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"probabilities from {p.min():g} to {p.max():g}; give numbers from 0 to 1, not logits")
    return p, _outcomes(outcomes, "probabilities", shape)


# ---------------------------------------------------------------------------------------------------------- scaling


@dataclass(frozen=True, slots=True)
class Scaling:
    """probability = sigmoid(slope * logit + intercept); `fitted` is False where the data could not tell: then unscaled."""

    slope: float = 1.0
    intercept: float = 0.0
    fitted: bool = False

    @property
    def temperature(self) -> float:
        """1 / slope; infinite where the logits say nothing."""
        return 1 / self.slope if self.slope else math.inf

    def apply(self, logits: Any) -> np.ndarray:
        """Probabilities of logits, of the same shape, float64. Raises InputError."""
        x, shape = _flat("logits", logits)
        return _sigmoid(self.slope * x + self.intercept).reshape(shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def fit_temperature(logits: Any, outcomes: Any) -> Scaling:
    """The slope, at least 0, that makes validation outcomes likeliest (temperature scaling, Guo et al., arXiv 1706.04599).

    logits, outcomes: [N] or [N, K]. As in `fit_platt`, outcomes are smoothed; with one class only, or all logits 0, there is
    nothing to fit and the identity scaling is returned. Raises InputError.
    """
    return _fit(logits, outcomes, with_intercept=False)


def fit_platt(logits: Any, outcomes: Any) -> Scaling:
    """Slope, at least 0, and intercept that make validation outcomes likeliest, with Platt's smoothed targets.

    logits, outcomes: [N] or [N, K]. Targets are (N₁ + 1) / (N₁ + 2) and 1 / (N₀ + 2) (Platt 1999), so separable data have a
    finite fit. With one class only the identity scaling is returned. Logits that rank backwards get slope 0: turning them
    around is no calibration. Raises InputError.
    """
    return _fit(logits, outcomes, with_intercept=True)


def _fit(logits: Any, outcomes: Any, with_intercept: bool) -> Scaling:
    x, shape = _flat("logits", logits)
    y = _outcomes(outcomes, "logits", shape)
    ones = int(y.sum())
    largest = float(np.abs(x).max())
    if ones in (0, len(y)) or not (largest or with_intercept):
        return Scaling()
    targets = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (len(y) - ones + 2))
    scale = largest or 1.0  # Newton's steps do not depend on it, its numbers' size does
    columns = [x / scale, np.ones_like(x)] if with_intercept else [x / scale]
    found = _newton(np.stack(columns, axis=1), targets)
    if found[0] <= 0:
        # The loss is convex, so its least with slope >= 0 lies on the border.
        found = np.array([0.0, *(_newton(np.ones((len(x), 1)), targets) if with_intercept else ())])
    return Scaling(float(found[0] / scale), float(found[1]) if with_intercept else 0.0, True)


def _newton(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [d] of the logistic regression on features [N, d]; damped, as plain Newton overshoots far from the least."""
    weights = np.zeros(features.shape[1])
    loss = _cross_entropy(features @ weights, targets)
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(features @ weights)
        gradient = features.T @ (p - targets) / len(targets)
        hessian = (features * (p * (1 - p))[:, None]).T @ features / len(targets)
        # The ridge changes the way, not the end; it matters where a direction is flat, as with equal logits.
        step = np.linalg.solve(hessian + 1e-10 * np.eye(len(weights)), gradient)
        size = 1.0
        while size > 1e-10 and not _cross_entropy(features @ (weights - size * step), targets) < loss:
            size /= 2
        if size <= 1e-10:
            break
        weights = weights - size * step
        loss = _cross_entropy(features @ weights, targets)
        if np.abs(size * step).max() < 1e-12 * (1 + np.abs(weights).max()):
            break
    return weights


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).mean())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


# ------------------------------------------------------------------------------------------- risk-controlled threshold


@dataclass(frozen=True, slots=True)
class CheckedThreshold:
    """One threshold on validation: questions that deviate, those gained and lost by it, and whether its risk is certified."""

    tau: float
    deviations: int
    gained: int
    lost: int
    p_value: float
    certified: bool


@dataclass(frozen=True, slots=True)
class RiskThreshold:
    """Leave the identity where the predicted gain is at least tau; infinity is never. Made by `risk_controlled_threshold`.

    `tested` has the thresholds in the order tested, those after a failure left out. All certified ones hold together at
    confidence 1 - delta, so any may be used; tau is the least of them.
    """

    tau: float
    epsilon: float
    delta: float
    n: int
    tested: tuple[CheckedThreshold, ...]

    def deviates(self, gains: Any) -> np.ndarray:
        """Booleans [n]: which of the questions with these predicted gains leave the identity."""
        return numbers("gains", gains) >= self.tau

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite tau is None."""
        tau = self.tau if math.isfinite(self.tau) else None
        return {**asdict(self), "tau": tau, "tested": [asdict(each) for each in self.tested]}


def risk_controlled_threshold(
    gains: Any, method_right: Any, identity_right: Any, *, epsilon: float = 0.01, delta: float = 0.05,
    grid: Sequence[float] = THRESHOLDS, starts: int = 1,
) -> RiskThreshold:  # fmt: skip
    """The least threshold on predicted gains with P(risk <= epsilon) >= 1 - delta, over draws of the validation questions.

    The risk is E[identity right - chosen right], the accuracy that choosing loses. gains: [n], finite; method_right,
    identity_right: booleans [n] of the proposed deviation and of the identity, over validation questions drawn as later ones
    will be, which chose neither predictor nor grid. grid: thresholds fixed beforehand.

    Learn then Test (Angelopoulos et al., arXiv 2110.01052): each threshold is a hypothesis "the risk exceeds epsilon", tested
    by `risk_p_value` from the largest on until one fails. That keeps all errors together at delta without dividing it among
    thresholds. With `starts` > 1 such sequences begin at that many evenly spaced places, each at delta / starts (their
    Algorithm 1): for an epsilon that the first thresholds, at which hardly a question deviates, cannot be certified for. Where
    no question was gained or lost, that takes more than ln(4 starts / delta) / epsilon questions; epsilon = 0 takes gains.
    Raises InputError.
    """
    g = numbers("gains", gains)
    n = len(g)
    method, identity = flags("method_right", method_right, n), flags("identity_right", identity_right, n)
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon is {epsilon}; give the share of questions that may be lost, from 0 to below 1")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}; give the probability of failing, between 0 and 1")
    taus = sorted({float(tau) for tau in numbers("grid", list(grid))}, reverse=True)
    if not 1 <= starts <= len(taus):
        raise InputError(f"{starts} starts in a grid of {len(taus)} thresholds; give from 1 to {len(taus)}")
    level = delta / starts
    tested: dict[float, CheckedThreshold] = {}
    for start in range(starts):
        for tau in taus[len(taus) * start // starts :]:
            if tau not in tested:
                chosen = g >= tau
                gained, lost = int((chosen & method & ~identity).sum()), int((chosen & ~method & identity).sum())
                p_value = risk_p_value(gained, lost, n, epsilon, slack=_NUISANCE * level)
                tested[tau] = CheckedThreshold(tau, int(chosen.sum()), gained, lost, p_value, p_value <= level)
            if not tested[tau].certified:
                break
    certified = [each.tau for each in tested.values() if each.certified]
    return RiskThreshold(min(certified, default=math.inf), epsilon, delta, n, tuple(tested.values()))


def risk_p_value(gained: int, lost: int, n: int, epsilon: float, slack: float) -> float:
    """A valid p of "P(lost) - P(gained) > epsilon" from counts of n independent questions, each gained, lost or neither.

    Given that D = gained + lost questions are discordant, lost is Binomial(D, q), and where the difference is at least epsilon,
    q >= (1 + epsilon / d) / 2 with d = P(gained) + P(lost). d is not known: it lies below its Clopper-Pearson bound but for a
    probability `slack`, which is added (Berger and Boos, JASA 89, 1994). Exact in finite samples, and sharper the fewer are
    discordant. With epsilon = 0 it needs no bound and is the one-sided sign test. Raises InputError.
    """
    if min(gained, lost) < 0 or not 0 < n >= gained + lost:
        raise InputError(f"{gained} gained and {lost} lost of {n} questions; give counts that fit")
    if not 0 < slack < 1:
        raise InputError(f"a slack of {slack}; give a probability between 0 and 1")
    discordant = gained + lost
    if epsilon == 0:
        return binomial_cdf(lost, discordant, 0.5)
    most = _upper_bound(discordant, n, slack)
    if most < epsilon:  # too few are discordant for such a risk
        return slack
    return min(1.0, slack + binomial_cdf(lost, discordant, min(1.0, (1 + epsilon / most) / 2)))


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) of X ~ Binomial(n, p)."""
    if k >= n or p <= 0:
        return 1.0
    if p >= 1 or k < 0:
        return 0.0
    i = np.arange(1, k + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(n - i + 1) - np.log(i))])
    terms = log_choose + np.arange(k + 1) * math.log(p) + (n - np.arange(k + 1)) * math.log1p(-p)
    return min(1.0, math.fsum(np.exp(terms).tolist()))


def _upper_bound(k: int, n: int, level: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share of k in n: what it exceeds with a probability of at most `level`."""
    low, high = k / n, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(k, n, middle) > level else (low, middle)
    return high  # the cautious side of the bisection
