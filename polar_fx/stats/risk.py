"""When to leave the identity: the least threshold on predicted gains that bounds the risk of losing
an answer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .paired import flags, numbers

# predicted gains from 0.5 down to 0
THRESHOLDS = tuple(round(0.5 - 0.02 * i, 2) for i in range(26))
NUISANCE = 0.25  # part of delta spent on the bound of the discordance


@dataclass(frozen=True, slots=True)
class CheckedThreshold:
    """One threshold on validation: questions that deviate, those gained and lost by it, and whether
    its risk is certified.
    """

    tau: float
    deviations: int
    gained: int
    lost: int
    p_value: float
    certified: bool


@dataclass(frozen=True, slots=True)
class RiskThreshold:
    """Leave the identity where the predicted gain is at least tau; infinity is never. Made by
    `risk_controlled_threshold`.

    `tested` has the thresholds in the order tested, those after a failure left out. All certified
    ones hold together at confidence 1 - delta, so any may be used; tau is the least of them.
    """

    tau: float
    epsilon: float
    delta: float
    n: int
    tested: tuple[CheckedThreshold, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite tau is None."""
        tau = self.tau if math.isfinite(self.tau) else None
        return {**asdict(self), "tau": tau, "tested": [asdict(each) for each in self.tested]}


def risk_controlled_threshold(
    gains: Any,
    method_right: Any,
    *,
    identity_right: Any,
    epsilon: float = 0.01,
    delta: float = 0.05,
    grid: Sequence[float] = THRESHOLDS,
    starts: int = 1,
) -> RiskThreshold:
    """The least threshold on predicted gains with P(risk <= epsilon) >= 1 - delta, over draws of
    the validation questions.

    The risk is E[identity right - chosen right], the accuracy that choosing loses. gains: [n],
    finite; method_right,
    identity_right: booleans [n] of the proposed deviation and of the identity, over validation
    questions drawn as later ones will be, which chose neither predictor nor grid. grid: thresholds
    fixed beforehand.

    Learn then Test (Angelopoulos et al., arXiv 2110.01052): each threshold is a hypothesis "the
    risk exceeds epsilon", tested by `risk_p_value` from the largest on until one fails. That keeps
    all errors together at delta without dividing it among thresholds. With `starts` > 1 such
    sequences begin at that many evenly spaced places, the first and the last threshold among them,
    each at delta / starts (their Algorithm 1): for an epsilon that the first thresholds, at which
    hardly a question deviates, cannot be certified for, and for gains that are large where most
    questions deviate. Where no question was gained or lost, that takes more than
    ln(4 starts / delta) / epsilon questions; epsilon = 0 takes gains. Raises InputError.
    """
    g = numbers("gains", gains)
    n = len(g)
    method, identity = (
        flags("method_right", method_right, n=n),
        flags("identity_right", identity_right, n=n),
    )
    if not 0 <= epsilon < 1:
        raise InputError(
            f"epsilon is {epsilon}; give the share of questions that may be lost, from 0 to below 1"
        )
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}; give the probability of failing, between 0 and 1")
    taus = sorted({float(tau) for tau in numbers("grid", list(grid))}, reverse=True)
    if not 1 <= starts <= len(taus):
        raise InputError(
            f"{starts} starts in a grid of {len(taus)} thresholds; give from 1 to {len(taus)}"
        )
    level = delta / starts
    tested: dict[float, CheckedThreshold] = {}
    for start in range(starts):
        for tau in taus[(len(taus) - 1) * start // max(1, starts - 1) :]:
            if tau not in tested:
                chosen = g >= tau
                gained, lost = (
                    int((chosen & method & ~identity).sum()),
                    int((chosen & ~method & identity).sum()),
                )
                p_value = risk_p_value(gained, lost, n=n, epsilon=epsilon, slack=NUISANCE * level)
                tested[tau] = CheckedThreshold(
                    tau, int(chosen.sum()), gained, lost, p_value, p_value <= level
                )
            if not tested[tau].certified:
                break
    certified = [each.tau for each in tested.values() if each.certified]
    return RiskThreshold(
        min(certified, default=math.inf), epsilon, delta, n, tuple(tested.values())
    )


def risk_p_value(gained: int, lost: int, *, n: int, epsilon: float, slack: float) -> float:
    """A valid p of "P(lost) - P(gained) > epsilon" from counts of n independent questions, each
    gained, lost or neither.

    Given that D = gained + lost questions are discordant, lost is Binomial(D, q), and where the
    difference is at least epsilon, q >= (1 + epsilon / d) / 2 with d = P(gained) + P(lost). d is
    not known: it lies below its Clopper-Pearson bound but for a probability `slack`, which is added
    (Berger and Boos, JASA 89, 1994). Exact in finite samples, and sharper the fewer are discordant.
    With epsilon = 0 it needs no bound and is the one-sided sign test. Raises InputError.
    """
    if min(gained, lost) < 0 or not 0 < n >= gained + lost:
        raise InputError(f"{gained} gained and {lost} lost of {n} questions; give counts that fit")
    if not 0 < slack < 1:
        raise InputError(f"a slack of {slack}; give a probability between 0 and 1")
    discordant = gained + lost
    if epsilon == 0:
        return binomial_cdf(lost, discordant, p=0.5)
    most = _upper_bound(discordant, n, level=slack)
    if most < epsilon:  # too few are discordant for such a risk
        return slack
    return min(1.0, slack + binomial_cdf(lost, discordant, p=min(1.0, (1 + epsilon / most) / 2)))


def least_questions(epsilon: float, delta: float, *, starts: int = 1) -> int:
    """With fewer questions `risk_controlled_threshold` certifies nothing but gains: so many are
    needed if choosing loses none of them.
    """
    slack = NUISANCE * delta / starts
    return math.ceil(math.log(slack) / math.log1p(-epsilon)) if epsilon else 0


def binomial_cdf(k: int, n: int, *, p: float) -> float:
    """P(X <= k) of X ~ Binomial(n, p)."""
    if k >= n or p <= 0:
        return 1.0
    if p >= 1 or k < 0:
        return 0.0
    i = np.arange(1, k + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(n - i + 1) - np.log(i))])
    terms = log_choose + np.arange(k + 1) * math.log(p) + (n - np.arange(k + 1)) * math.log1p(-p)
    return min(1.0, math.fsum(np.exp(terms).tolist()))


def _upper_bound(k: int, n: int, *, level: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share of k in n: what it exceeds with a
    probability of at most `level`.
    """
    low, high = k / n, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(k, n, p=middle) > level else (low, middle)
    return high  # the cautious side of the bisection
