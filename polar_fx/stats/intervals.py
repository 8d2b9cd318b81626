"""Shares with their uncertainty, and rank correlation."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z = 1.959963984540054  # of 95 %, two-sided


def wilson(count: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` in `n`; (0, 1) of none.

    Wilson's score interval: unlike the share plus or minus its standard error, it has width at 0
    and n too.
    """
    if not n:
        return 0.0, 1.0
    share, spread = count / n, _Z**2 / n
    middle, half = share + spread / 2, _Z * math.sqrt((share * (1 - share) + spread / 4) / n)
    # Rounding must not leave 0..1, nor the share outside.
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (0.0 if count == 0 else max(0.0, low)), (1.0 if count == n else min(1.0, high))


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `n` that have some property; without a value where n is 0."""

    count: int
    n: int

    @classmethod
    def of(cls, flags: Iterable[bool]) -> "Share":
        """How many are true."""
        values = [bool(flag) for flag in flags]
        return cls(sum(values), len(values))

    @property
    def value(self) -> float | None:
        return self.count / self.n if self.n else None

    def to_dict(self) -> dict[str, Any]:
        """{count, n, share, low, high}; the last three, of which two are the 95 % interval, are
        None where n is 0.
        """
        low, high = wilson(self.count, self.n) if self.n else (None, None)
        return {"count": self.count, "n": self.n, "share": self.value, "low": low, "high": high}


def share_text(share: Mapping[str, Any], *, digits: int = 1, unknown: str = "–") -> str:
    """`42.4 [40.1, 44.8]`, in percent, of what `Share.to_dict` gives; the interval with so many
    digits, and `unknown` for a share of nothing.
    """
    if share["share"] is None:
        return unknown
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['share']:.1f} [{low:.{digits}f}, {high:.{digits}f}]"


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, which, counts = np.unique(
        np.asarray(values, dtype=float), return_inverse=True, return_counts=True
    )
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation of pairs, -1 to 1; None where one side does not vary, as with less than
    two pairs.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}; give pairs")
    if len(first) < 2:
        return None
    x, y = (each - each.mean() for each in (ranks(first), ranks(second)))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale else None


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return float(np.mean(values)) if len(values) else None
