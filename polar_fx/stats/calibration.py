"""How far to believe predicted probabilities: reliability, and scaling that improves it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .intervals import Share
from .paired import numbers

BINNINGS = ("mass", "width")
_FLOOR = 1e-12  # a certain miss costs 27.6 nats in the log loss, not infinitely many
_NEWTON_STEPS = 100


# -------------------------------------------------------------------------------------- reliability


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions that lie together: their range, their mean, and how often they came true."""

    low: float
    high: float
    mean: float
    outcomes: Share

    def to_dict(self) -> dict[str, Any]:
        return {
            "low": self.low,
            "high": self.high,
            "mean": self.mean,
            "outcomes": self.outcomes.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Reliability:
    """Bins, without empty ones, in rising order; made by `reliability`."""

    bins: tuple[Bin, ...]
    n: int

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |share that came true - mean prediction| over the bins,
        weighted by count, 0 to 1.
        """
        gaps = (b.outcomes.n * abs(b.outcomes.count / b.outcomes.n - b.mean) for b in self.bins)
        return math.fsum(gaps) / self.n

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"n": self.n, "ece": self.ece, "bins": [each.to_dict() for each in self.bins]}


def reliability(
    probabilities: Any, outcomes: Any, *, bins: int = 10, equal: str = "mass"
) -> Reliability:
    """Bins of predictions [N] or [N, K] against what came true, {0, 1} of the same shape.

    equal: "mass" puts as many predictions into each bin, as far as equal ones, which stay together,
    allow; "width" cuts 0..1 into equal parts. Equal mass is the less biased (Roelofs et al., arXiv
    2012.08668). Raises InputError.
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
        low, high = (
            (p[inside].min(), p[inside].max())
            if equal == "mass"
            else (index / bins, (index + 1) / bins)
        )
        share = Share(int(y[inside].sum()), int(inside.sum()))
        found.append(Bin(float(low), float(high), float(p[inside].mean()), share))
    return Reliability(tuple(found), len(p))


def ece(probabilities: Any, outcomes: Any, *, bins: int = 10, equal: str = "mass") -> float:
    """`Reliability.ece` of predictions [N] or [N, K]."""
    return reliability(probabilities, outcomes, bins=bins, equal=equal).ece


def brier(probabilities: Any, outcomes: Any) -> float:
    """Mean squared difference of predictions [N] or [N, K] and outcomes; 0 is best, 0.25 what a
    constant 1/2 has.
    """
    p, y = _predictions(probabilities, outcomes)
    return float(((p - y) ** 2).mean())


def log_loss(probabilities: Any, outcomes: Any) -> float:
    """Mean negative log-likelihood of outcomes, in nats; predictions are kept 1e-12 away from 0 and
    1, so it is finite.
    """
    p, y = _predictions(probabilities, outcomes)
    p = np.clip(p, _FLOOR, 1 - _FLOOR)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def _flat(name: str, values: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    array = np.asarray(values)
    if array.ndim not in (1, 2):
        raise InputError(f"{name} has shape {list(array.shape)}; give [N] or [N, K]")
    return numbers(name, array.ravel()), array.shape


def _outcomes(outcomes: Any, of: str, *, shape: tuple[int, ...]) -> np.ndarray:
    y, own = _flat("outcomes", outcomes)
    if own != shape:
        raise InputError(
            f"outcomes have shape {list(own)} and {of} {list(shape)}; give one outcome each"
        )
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError(
            f"outcomes hold {y[~np.isin(y, (0.0, 1.0))][0]:g}; give 0 and 1, or booleans"
        )
    return y


def _predictions(probabilities: Any, outcomes: Any) -> tuple[np.ndarray, np.ndarray]:
    p, shape = _flat("probabilities", probabilities)
    if p.min() < 0 or p.max() > 1:
        raise InputError(
            f"probabilities from {p.min():g} to {p.max():g}; give numbers from 0 to 1, not logits"
        )
    return p, _outcomes(outcomes, "probabilities", shape=shape)


# ------------------------------------------------------------------------------------------ scaling


@dataclass(frozen=True, slots=True)
class Scaling:
    """probability = sigmoid(slope * logit + intercept); `fitted` is False where the data could not
    tell: then unscaled.
    """

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
        return sigmoid(self.slope * x + self.intercept).reshape(shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def fit_temperature(logits: Any, outcomes: Any) -> Scaling:
    """The slope, at least 0, that makes validation outcomes likeliest (temperature scaling, Guo et
    al., arXiv 1706.04599).

    logits, outcomes: [N] or [N, K]. As in `fit_platt`, outcomes are smoothed; with one class only,
    or all logits 0, there is nothing to fit and the identity scaling is returned. Raises
    InputError.
    """
    return _fit(logits, outcomes, with_intercept=False)


def fit_platt(logits: Any, outcomes: Any) -> Scaling:
    """Slope, at least 0, and intercept that make validation outcomes likeliest, with Platt's
    smoothed targets.

    logits, outcomes: [N] or [N, K]. Targets are (N₁ + 1) / (N₁ + 2) and 1 / (N₀ + 2) (Platt 1999),
    so separable data have a finite fit. With one class only the identity scaling is returned.
    Logits that rank backwards get slope 0: turning them
    around is no calibration. Raises InputError.
    """
    return _fit(logits, outcomes, with_intercept=True)


def _fit(logits: Any, outcomes: Any, *, with_intercept: bool) -> Scaling:
    x, shape = _flat("logits", logits)
    y = _outcomes(outcomes, "logits", shape=shape)
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
    """Weights [d] of the logistic regression on features [N, d]; damped, as plain Newton overshoots
    far from the least.
    """
    weights = np.zeros(features.shape[1])
    loss = _cross_entropy(features @ weights, targets)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(features @ weights)
        gradient = features.T @ (p - targets) / len(targets)
        hessian = (features * (p * (1 - p))[:, None]).T @ features / len(targets)
        # The ridge changes the way, not the end; it matters where a direction is flat, as with
        # equal logits.
        step = np.linalg.solve(hessian + 1e-10 * np.eye(len(weights)), gradient)
        size = 1.0
        while (
            size > 1e-10 and not _cross_entropy(features @ (weights - size * step), targets) < loss
        ):
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


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Probabilities of logits, of any shape."""
    return np.exp(-np.logaddexp(0, -x))
