"""One method against the identity on the same questions: gain, its uncertainty, tests, steps, and
how many questions it takes.

Gains are in points (hundredths of accuracy), all other shares are 0 to 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import InputError
from .intervals import Share

RESAMPLES = 10_000
_Z = NormalDist().inv_cdf(0.975)
_MOST_DRAWS = 4_000_000  # numbers drawn at once; bounds memory to some 30 MB


def flags(name: str, values: Any, *, n: int | None = None) -> np.ndarray:
    """A read-only boolean copy, shape [n].

    Raises InputError if empty, not boolean, or of another length.
    """
    array = _array(name, values, dtype=None, n=n)
    if array.dtype != np.bool_:
        raise InputError(
            f"{name} holds {array.dtype} values; give booleans, as `np.asarray(values) == 1` "
            "makes of 0 and 1"
        )
    array.setflags(write=False)
    return array


def numbers(name: str, values: Any, *, n: int | None = None) -> np.ndarray:
    """A read-only, finite float64 copy, shape [n].

    Raises InputError if empty, NaN or of another length.
    """
    array = _array(name, values, dtype=np.float64, n=n)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(f"{name}[{at}] is {array[at]}; give finite numbers only")
    array.setflags(write=False)
    return array


def _array(name: str, values: Any, *, dtype: Any, n: int | None) -> np.ndarray:
    try:
        array = np.array(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be read: {error}; give one value a question, [n]"
        ) from error
    if array.ndim != 1:
        raise InputError(f"{name} has shape {list(array.shape)}; give one value a question, [n]")
    if not len(array):
        raise InputError(f"{name} is empty; give at least one question")
    if n is not None and len(array) != n:
        raise InputError(
            f"{name} has {len(array)} values for {n} questions; give both sides over the same "
            "questions"
        )
    return array


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Paired:
    """A method and the identity on the same n questions; made by `compare`.

    method, identity: how many are right; their intervals (Wilson) are in `to_dict`
    gain: method - identity in points, with the percentile interval of the paired bootstrap
    score: the same gain with Tango's score interval (Statistics in Medicine 17, 1998), which has
        width even where no pair is discordant; there the bootstrap's has none. It does not know of
        strata
    gained, lost: questions only the method, and only the identity, gets right
    p_value: of McNemar's exact test, two-sided
    steps, step_ratio: executed steps a question, and their ratio to the identity's; None if no
    steps were given
    """

    n: int
    method: Share
    identity: Share
    gain: Estimate
    score: Estimate
    gained: int
    lost: int
    p_value: float
    steps: Estimate | None = None
    step_ratio: Estimate | None = None

    @property
    def discordance(self) -> float:
        """Share of the questions on which the two differ."""
        return (self.gained + self.lost) / self.n

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        parts = {
            name: getattr(self, name)
            for name in ("method", "identity", "gain", "score", "steps", "step_ratio")
        }
        dicts = {name: None if part is None else part.to_dict() for name, part in parts.items()}
        return {
            "n": self.n,
            "gained": self.gained,
            "lost": self.lost,
            "p_value": self.p_value,
            **dicts,
        }


def compare(
    right: Any,
    identity_right: Any,
    *,
    steps: Any = None,
    identity_steps: Any = None,
    strata: Sequence[Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Paired:
    """Compare boolean arrays [n] over the same questions.

    steps: executed steps of each question, [n]; with them `identity_steps`, [n] or one number for
    all. `strata`: the task of each question, [n]; resamples then keep the number of questions a
    task. The same seed gives the same intervals, and those
    of the gain do not depend on whether steps are given. Raises InputError for arrays that are
    empty, of unequal length, not boolean or not finite.
    """
    mine = flags("right", right)
    n = len(mine)
    theirs = flags("identity_right", identity_right, n=n)
    if resamples < 1:
        raise InputError(f"{resamples} resamples; give at least one, {RESAMPLES:,} for a report")
    codes = strata_codes(strata, n)
    difference = mine.astype(np.float64) - theirs
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    means = _resampled_means(
        difference[:, None], codes, resamples=resamples, rng=np.random.default_rng([seed, 0])
    )
    gain = _estimate(100 * (gained - lost) / n, 100 * means[:, 0])
    low, high = _score_interval(gained, lost, n=n)
    score = Estimate(gain.value, 100 * low, 100 * high)
    mean_steps = ratio = None
    if (steps is None) is not (identity_steps is None):
        raise InputError("steps of one side only; give steps and identity_steps, or neither")
    if steps is not None:
        both = np.stack(
            [step_counts("steps", steps, n=n), step_counts("identity_steps", identity_steps, n=n)],
            axis=1,
        )
        if (both[:, 1] == 0).any():
            raise InputError(
                "identity_steps has a 0; the identity runs at least one step a question"
            )
        means = _resampled_means(
            both, codes, resamples=resamples, rng=np.random.default_rng([seed, 1])
        )
        mean, base = both.mean(axis=0).tolist()
        mean_steps, ratio = (
            _estimate(mean, means[:, 0]),
            _estimate(mean / base, means[:, 0] / means[:, 1]),
        )
    shares = Share(int(mine.sum()), n), Share(int(theirs.sum()), n)
    return Paired(n, *shares, gain, score, gained, lost, mcnemar(gained, lost), mean_steps, ratio)


def step_counts(name: str, values: Any, *, n: int) -> np.ndarray:
    """`numbers` of at least 0; one number stands for all questions. Raises InputError."""
    # one number stands for all
    array = numbers(name, np.full(n, values) if np.ndim(values) == 0 else values, n=n)
    if array.min() < 0:
        raise InputError(
            f"{name}[{int(array.argmin())}] is {array.min():g}; give executed steps, 0 or more"
        )
    return array


def strata_codes(strata: Sequence[Any] | None, n: int) -> np.ndarray:
    """A number for each question's stratum. Raises InputError if there is not one a question."""
    if strata is None:
        return np.zeros(n, dtype=np.int64)
    if len(strata) != n:
        raise InputError(
            f"strata has {len(strata)} values for {n} questions; give the task of each question"
        )
    return np.unique([str(each) for each in strata], return_inverse=True)[1]


def _resampled_means(
    values: np.ndarray, codes: np.ndarray, *, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Means [resamples, d] of bootstrap resamples of the rows of values [n, d].

    Only how often each distinct row is drawn matters, and those counts are multinomial: this is the
    ordinary bootstrap, without n indices a resample.
    """
    totals = np.zeros((resamples, values.shape[1]))
    for code in np.unique(codes):
        rows, counts = np.unique(values[codes == code], axis=0, return_counts=True)
        size = int(counts.sum())
        chunk = max(1, _MOST_DRAWS // len(rows))
        for start in range(0, resamples, chunk):
            part = totals[start : start + chunk]  # a view
            part += rng.multinomial(size, counts / size, size=len(part)).astype(np.float64) @ rows
    return totals / len(values)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def _score_interval(gained: int, lost: int, *, n: int) -> tuple[float, float]:
    """Tango's 95 % interval of the difference of paired shares, by bisection of the score, which
    falls in the difference.
    """

    def score(delta: float) -> float:
        b = (2 * n - gained + lost) * delta - gained - lost
        c = -lost * delta * (1 - delta)
        # its likeliest share, given the difference
        only_identity = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * only_identity + delta * (1 - delta))
        above = gained - lost - n * delta
        return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above)

    def solve(near: float, far: float, *, target: float) -> float:
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (middle, far) if abs(score(middle)) < target else (near, middle)
        return far

    value = (gained - lost) / n
    return (solve(value, -1.0, target=_Z) if value > -1 else -1.0), (
        solve(value, 1.0, target=_Z) if value < 1 else 1.0
    )


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test: twice the binomial tail at 1/2, at most 1; 1 without
    discordant pairs.
    """
    if gained < 0 or lost < 0:
        raise InputError(f"{gained} gained and {lost} lost pairs; give counts, 0 or more")
    pairs, few = gained + lost, min(gained, lost)
    term = tail = 1
    for k in range(few):
        term = term * (pairs - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**pairs)  # of integers: exact but for the division


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given; one at or below α is significant with all errors
    together kept at α.
    """
    values = [float(p) for p in p_values]
    for p in values:
        if not 0 <= p <= 1:
            raise InputError(f"a p-value of {p}; give numbers from 0 to 1")
    adjusted, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = least
    return adjusted
