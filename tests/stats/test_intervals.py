"""Intervals, ranks and correlations, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_fx.stats.intervals import Share, ranks, share_text, spearman, wilson
from shares import share


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        (5, 10, 0.23659, 0.76341),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (1, 10, 0.01788, 0.40415),
        (81, 263, 0.25529, 0.36621),
        (0, 0, 0.0, 1.0),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilson_gives_known_intervals(count: int, n: int, low: float, high: float) -> None:
    assert wilson(count, n) == pytest.approx((low, high), abs=2e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case: tuple[int, int]) -> None:
    count, n = case
    low, high = wilson(count, n)
    assert 0 <= low <= count / n <= high <= 1 and low < high
    assert wilson(n - count, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_a_share_of_none_has_no_value() -> None:
    assert share(0, 0) == {"count": 0, "n": 0, "share": None, "low": None, "high": None}
    assert Share.of([True, False, True]) == Share(2, 3)


def test_ranks_share_the_mean() -> None:
    assert ranks([10, -math.inf, 10, 3]).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / 120
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),
        ([-math.inf, 0, 1], [0, 1, 1], 1.5 / math.sqrt(2 * 1.5)),  # ranks 1, 2.5, 2.5
    ],
)
def test_spearman_with_ties(first: list[float], second: list[float], expected: float) -> None:
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(second, first) == pytest.approx(expected)


@pytest.mark.parametrize(
    "pair", [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])]
)
def test_spearman_is_undefined_where_nothing_varies(pair: tuple[list[float], list[float]]) -> None:
    assert spearman(*pair) is None
    with pytest.raises(ValueError, match="pairs"):
        spearman([1.0], [])


def test_a_share_as_text() -> None:
    found = Share(1, 4).to_dict()
    assert share_text(found) == "25.0 [4.6, 69.9]"
    assert share_text(found, digits=0) == "25.0 [5, 70]"
    assert share_text(Share(0, 0).to_dict()) == "–"
    assert share_text(Share(0, 0).to_dict(), unknown="-") == "-"
