"""Calibration by hand, and a threshold whose guarantee is put to the test on many drawn validation
sets.
"""

import json
import math
from typing import Any

import numpy as np
import pytest

from polar_fx.errors import InputError
from polar_fx.stats.calibration import (
    Scaling,
    brier,
    ece,
    fit_platt,
    fit_temperature,
    log_loss,
    reliability,
)
from polar_fx.stats.intervals import Share
from polar_fx.stats.risk import (
    THRESHOLDS,
    binomial_cdf,
    least_questions,
    risk_controlled_threshold,
    risk_p_value,
)

# Reliability

P = [0.1, 0.1, 0.3, 0.7, 0.9, 1.0]
Y = [0, 1, 0, 1, 1, 1]


def test_equal_width_by_hand() -> None:
    found = reliability(P, Y, bins=2, equal="width")
    assert [(b.low, b.high, b.outcomes) for b in found.bins] == [
        (0, 0.5, Share(1, 3)),
        (0.5, 1, Share(3, 3)),
    ]
    assert [b.mean for b in found.bins] == pytest.approx([0.5 / 3, 2.6 / 3])
    assert found.ece == pytest.approx((3 * (1 / 3 - 0.5 / 3) + 3 * (1 - 2.6 / 3)) / 6)
    assert ece(P, Y, bins=2, equal="width") == found.ece == found.to_dict()["ece"]


def test_empty_bins_are_left_out_and_ends_belong_somewhere() -> None:
    found = reliability([0.0, 0.5, 1.0], [0, 1, 1], bins=10, equal="width")
    assert [(b.low, b.high) for b in found.bins] == [(0, 0.1), (0.5, 0.6), (0.9, 1)]


def test_equal_mass_by_hand() -> None:
    found = reliability([0.9, 0.2, 0.4, 0.1, 0.3, 0.8], Y, bins=3)
    assert [(b.low, b.high, b.outcomes.n) for b in found.bins] == [
        (0.1, 0.2, 2),
        (0.3, 0.4, 2),
        (0.8, 0.9, 2),
    ]
    assert [b.outcomes.count for b in found.bins] == [2, 1, 1]


def test_equal_predictions_stay_together_in_any_order() -> None:
    p, y = np.array([0.5] * 6 + [0.8, 0.9]), np.array([1, 0, 0, 0, 1, 1, 1, 0])
    orders = [np.random.default_rng(seed).permutation(8) for seed in range(5)]
    found = {reliability(p[order], y[order], bins=4) for order in orders}
    assert len(found) == 1 and [b.outcomes for b in found.pop().bins] == [Share(3, 6), Share(1, 2)]
    assert (
        len(reliability([0.5] * 4, [0, 1, 1, 0]).bins) == 1
        and len(reliability(p, y, bins=1).bins) == 1
    )


def test_scores_by_hand_and_of_matrices() -> None:
    assert brier([0.5, 1.0, 0.0], [1, 1, 1]) == pytest.approx((0.25 + 0 + 1) / 3)
    assert log_loss([0.5, 0.25], [1, 0]) == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    assert log_loss([0.0], [True]) == pytest.approx(12 * math.log(10)) and log_loss(
        [1.0], [1]
    ) == pytest.approx(0, abs=1e-11)
    p, y = np.array([[0.1, 0.6], [0.7, 0.2]]), np.array([[0, 1], [1, 1]])
    for score in (ece, brier, log_loss):
        assert score(p, y) == score(p.ravel(), y.ravel())


@pytest.mark.parametrize(
    ("p", "y", "words"),
    [
        ([], [], "probabilities is empty"),
        ([0.5], [0, 1], r"outcomes have shape \[2\] and probabilities \[1\]"),
        ([[0.5]], [0], r"outcomes have shape \[1\]"),
        ([1.5], [0], "from 1.5 to 1.5; give numbers from 0 to 1"),
        ([math.nan], [0], "is nan"),
        ([0.5], [2], "outcomes hold 2"),
        ([[[0.5]]], [0], r"shape \[1, 1, 1\]"),
        ([0.5], [0.5], "hold 0.5"),
    ],
)
def test_scores_refuse(p: Any, y: Any, words: str) -> None:
    for score in (ece, brier, log_loss):
        with pytest.raises(InputError, match=words):
            score(p, y)


def test_binnings_are_refused() -> None:
    with pytest.raises(InputError, match="unknown binning 'size'; use one of mass, width"):
        reliability([0.5], [1], equal="size")
    with pytest.raises(InputError, match="0 bins"):
        reliability([0.5], [1], bins=0)


# Scaling


def _drawn(slope: float, intercept: float, *, n: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, n)
    return logits, rng.random(n) < 1 / (1 + np.exp(-(slope * logits + intercept)))


def test_temperature_is_found() -> None:
    logits, y = _drawn(0.4, 0)
    found = fit_temperature(logits, y)
    assert (
        found.temperature == pytest.approx(2.5, rel=0.04) and found.intercept == 0 and found.fitted
    )
    assert ece(found.apply(logits), y) < 0.01 < 0.1 < ece(Scaling().apply(logits), y)


def test_platt_is_found_and_is_least() -> None:
    logits, y = _drawn(0.7, -1.2)
    found = fit_platt(logits, y)
    assert found.slope == pytest.approx(0.7, abs=0.03) and found.intercept == pytest.approx(
        -1.2, abs=0.04
    )
    least = log_loss(found.apply(logits), y)
    for slope, intercept in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        other = Scaling(found.slope + slope, found.intercept + intercept)
        assert log_loss(other.apply(logits), y) > least
    matrix = fit_platt(logits.reshape(-1, 4), y.reshape(-1, 4))
    assert matrix == found and found.apply(logits.reshape(-1, 4)).shape == (10_000, 4)


def test_platt_of_two_groups_meets_the_smoothed_shares() -> None:
    """Two distinct logits and two weights fit exactly: at each logit, the mean of Platt's targets
    there.
    """
    logits, y = np.array([1.0] * 10 + [-1.0] * 10), np.array([1] * 8 + [0] * 2 + [1] * 3 + [0] * 7)
    up, down = 12 / 13, 1 / 11
    expected = [(8 * up + 2 * down) / 10, (3 * up + 7 * down) / 10]
    assert fit_platt(logits, y).apply([1.0, -1.0]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("fit", [fit_platt, fit_temperature])
def test_separable_data_have_a_finite_fit(fit: Any) -> None:
    logits = np.array([-1e6, -5e5, 5e5, 1e6])
    found = fit(logits, [0, 0, 1, 1])
    assert 0 < found.slope < 1 and found.fitted
    assert found.apply([5e5])[0] > 0.6 and np.isfinite(found.apply(logits)).all()


@pytest.mark.parametrize("fit", [fit_platt, fit_temperature])
def test_one_class_and_useless_logits(fit: Any) -> None:
    for outcomes in ([0, 0, 0], [1, 1, 1]):
        assert fit([0.3, -2.0, 5.0], outcomes) == Scaling(1, 0, False)
    backwards = fit([3.0, 2.0, -2.0, -3.0], [0, 0, 1, 1])
    assert backwards.slope == 0 and backwards.temperature == math.inf
    assert backwards.apply([3.0, -3.0]) == pytest.approx([0.5, 0.5])
    assert np.isfinite(fit([2.0, 2.0, 2.0], [0, 1, 1]).apply([2.0, -9.0])).all()
    with pytest.raises(InputError, match="is nan"):
        fit([math.nan, 1], [0, 1])
    with pytest.raises(InputError, match=r"outcomes have shape \[1\] and logits \[2\]"):
        fit([1, 2], [0])


def test_all_equal_logits_get_the_base_rate_or_nothing() -> None:
    found = fit_platt([2.0] * 6, [1, 1, 1, 0, 0, 1])
    assert found.apply([2.0])[0] == pytest.approx((4 * 5 / 6 + 2 / 4) / 6, abs=1e-6)
    assert fit_platt([0.0] * 4, [0, 1, 1, 1]).apply([0.0])[0] == pytest.approx(
        (3 * 4 / 5 + 1 / 3) / 4, abs=1e-6
    )
    assert fit_temperature([0.0] * 4, [0, 1, 1, 1]) == Scaling()
    assert Scaling().apply([-1e308, 1e308]).tolist() == [0, 1]
    assert json.dumps(found.to_dict())


# The threshold


def test_binomial_cdf_by_hand() -> None:
    for n, p in ((1, 0.3), (7, 0.5), (30, 0.9)):
        for k in range(n + 1):
            exact = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
            assert binomial_cdf(k, n, p=p) == pytest.approx(exact, rel=1e-10)
    assert (
        binomial_cdf(0, 0, p=0.5),
        binomial_cdf(-1, 5, p=0.5),
        binomial_cdf(2, 5, p=1.0),
        binomial_cdf(0, 5, p=0.0),
    ) == (1, 0, 0, 1)


def test_risk_p_value_by_hand() -> None:
    assert risk_p_value(6, 1, n=100, epsilon=0, slack=0.01) == pytest.approx(
        8 / 128
    )  # the sign test
    assert risk_p_value(0, 0, n=100, epsilon=0, slack=0.01) == 1
    # none discordant: P(gained or lost) <= 1 - 0.01^(1/n), 4.5 % of 100 and 0.46 % of 1000
    assert risk_p_value(0, 0, n=100, epsilon=0.01, slack=0.01) == 1
    assert risk_p_value(0, 0, n=1_000, epsilon=0.01, slack=0.01) == 0.01
    # one of one: its share is bounded by 1, so that q >= (1 + 0.2) / 2
    assert risk_p_value(1, 0, n=1, epsilon=0.2, slack=0.01) == pytest.approx(0.01 + 0.4)
    assert (
        risk_p_value(30, 10, n=1_000, epsilon=0.01, slack=0.01)
        < risk_p_value(30, 20, n=1_000, epsilon=0.01, slack=0.01)
        < risk_p_value(30, 20, n=1_000, epsilon=0.005, slack=0.01)
    )
    for gained, lost, n, slack, words in (
        (3, 3, 5, 0.1, "3 gained and 3 lost of 5"),
        (0, 0, 0, 0.1, "of 0"),
        (1, 1, 5, 0.0, "slack of 0"),
    ):
        with pytest.raises(InputError, match=words):
            risk_p_value(gained, lost, n=n, epsilon=0.01, slack=slack)


@pytest.mark.parametrize(
    ("discordance", "epsilon", "n"),
    [(0.02, 0.02, 400), (0.05, 0.02, 400), (0.3, 0.02, 300), (0.2, 0.0, 200)],
)
def test_the_p_value_is_valid_at_the_border(discordance: float, epsilon: float, n: int) -> None:
    """Over 20,000 draws: where the risk is epsilon, p <= 0.1 comes at most as often as in one of
    ten.
    """
    rng = np.random.default_rng(0)
    shares = [(discordance - epsilon) / 2, (discordance + epsilon) / 2, 1 - discordance]
    outcomes, times = np.unique(rng.multinomial(n, shares, size=20_000), axis=0, return_counts=True)
    p = np.array(
        [
            risk_p_value(int(gained), int(lost), n=n, epsilon=epsilon, slack=0.025)
            for gained, lost, _ in outcomes
        ]
    )
    assert times[p <= 0.1].sum() / times.sum() < 0.1 + 0.005


def _questions(
    rng: np.random.Generator, n: int, *, risk: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted gains that say nothing, and deviations that lose `risk` more questions than they
    gain at threshold 0.
    """
    gains = rng.random(n) - 0.5  # half deviate at 0
    draw = rng.random(n)
    share = 0.2
    gained, lost = draw < share / 2 - risk, (draw >= share / 2 - risk) & (draw < share)
    same = rng.random(n) < 0.5
    return gains, np.where(gained | lost, gained, same), np.where(gained | lost, lost, same)


@pytest.mark.parametrize("starts", [1, 4])
def test_the_guarantee_holds(starts: int) -> None:
    """Deviating at 0 risks 3 %, at tau in (0, 0.5) 6 % times the share above it: of epsilon = 1 %
    from tau = 1/3 on.
    """
    rng = np.random.default_rng(0)
    grid = [0.5 - i / 24 for i in range(13)]
    repeats, wrong, found = 400, 0, 0
    for _ in range(repeats):
        gains, method, identity = _questions(rng, 1_000, risk=0.03)
        chosen = risk_controlled_threshold(
            gains,
            method,
            identity_right=identity,
            epsilon=0.01,
            delta=0.1,
            grid=grid,
            starts=starts,
        )
        wrong += 0.06 * max(0.0, 0.5 - max(chosen.tau, 0.0)) > 0.01 + 1e-9
        found += math.isfinite(chosen.tau)
    # 3 standard deviations of a binomial count above delta
    assert wrong <= 0.1 * repeats + 3 * math.sqrt(0.09 * repeats)
    assert found > 0.5 * repeats  # and it is not kept by refusing everything


def test_a_good_predictor_is_let_loose_and_a_bad_one_is_not() -> None:
    rng = np.random.default_rng(2)
    gains, identity = rng.uniform(-0.5, 0.5, 2_000), rng.random(2_000) < 0.5
    method = np.where(
        gains > 0, identity | (rng.random(2_000) < gains), identity & (rng.random(2_000) > -gains)
    )
    good = risk_controlled_threshold(gains, method, identity_right=identity)
    assert (
        good.tau == 0
        and all(each.certified for each in good.tested)
        and len(good.tested) == len(THRESHOLDS)
    )
    assert good.tau == 0.0
    bad = risk_controlled_threshold(
        gains, identity & (rng.random(2_000) < 0.3), identity_right=identity, grid=[0.0]
    )
    assert bad.tau == math.inf
    assert json.loads(json.dumps(bad.to_dict()))["tau"] is None
    (only,) = bad.tested
    assert (
        only.deviations == (gains >= 0).sum() and only.gained == 0 < only.lost and only.p_value == 1
    )


def test_testing_stops_at_the_first_failure() -> None:
    """Above 0.3 lost, below gained: overall a gain, but the large ones come first."""
    gains = np.repeat([0.4, 0.2], [500, 1_500])
    identity = gains > 0.3
    found = risk_controlled_threshold(
        gains, ~identity, identity_right=identity, grid=[0.1, 0.3, 0.6]
    )
    assert [(each.tau, each.certified) for each in found.tested] == [
        (0.6, True),
        (0.3, False),
    ] and found.tau == 0.6
    again = risk_controlled_threshold(
        gains, ~identity, identity_right=identity, grid=[0.1, 0.3, 0.6], starts=3
    )
    assert again.tau == 0.1 and [each.tau for each in again.tested] == [0.6, 0.3, 0.1]


def test_the_last_threshold_is_one_of_the_starts() -> None:
    """Small predicted gains, many of them right: only where nearly all deviate is that seen."""
    rng = np.random.default_rng(5)
    gains, draw = rng.uniform(0, 0.1, 500), rng.random(500)
    method, identity = draw < 0.12, (draw > 0.1) & (draw < 0.14)
    one, several = (
        risk_controlled_threshold(gains, method, identity_right=identity, delta=0.01, starts=starts)
        for starts in (1, 4)
    )
    assert one.tau == math.inf and several.tau == 0
    assert {0.5, 0.34, 0.18, 0.0} <= {each.tau for each in several.tested}


def test_no_loss_at_all_takes_gains_and_a_second_start() -> None:
    gains = np.full(200, 0.2)
    identity = np.zeros(200, bool)
    assert (
        risk_controlled_threshold(
            gains, ~identity, identity_right=identity, epsilon=0, grid=[0.5, 0.1]
        ).tau
        == math.inf
    )
    assert (
        risk_controlled_threshold(
            gains, ~identity, identity_right=identity, epsilon=0, grid=[0.5, 0.1], starts=2
        ).tau
        == 0.1
    )


def test_starts_share_the_level() -> None:
    """Five gained and none lost: p = 1/32 is below delta = 0.05, and above the half of it that each
    of two starts has.
    """
    identity = np.zeros(5, bool)
    for starts, tau in ((1, 0.1), (2, math.inf)):
        grid = [0.1, 0.05][:starts]
        assert (
            risk_controlled_threshold(
                [0.2] * 5, ~identity, identity_right=identity, epsilon=0, grid=grid, starts=starts
            ).tau
            == tau
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gains": [math.nan, 1]}, r"gains\[0\] is nan"),
        ({"method_right": [True]}, "method_right has 1 values"),
        ({"identity_right": [0, 1]}, "identity_right holds int64"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"delta": 0}, "delta is 0"),
        ({"grid": []}, "grid is empty"),
        ({"starts": 3}, "3 starts in a grid of 2"),
        ({"gains": [], "grid": [1]}, "gains is empty"),
    ],
)
def test_the_threshold_refuses(change: dict[str, Any], words: str) -> None:
    given = {
        "gains": [0.1, 0.2],
        "method_right": [True, True],
        "identity_right": [True, False],
        "grid": [0.1, 0.2],
        **change,
    }
    with pytest.raises(InputError, match=words):
        risk_controlled_threshold(**given)


@pytest.mark.parametrize("starts", [1, 4])
def test_so_many_questions_are_needed_to_certify_anything(starts: int) -> None:
    least = least_questions(0.01, 0.05, starts=starts)

    def certified(n: int) -> bool:
        gains, right = np.linspace(0, 0.6, n), np.ones(n, bool)
        found = risk_controlled_threshold(gains, right, identity_right=right, starts=starts)
        return bool(np.isfinite(found.tau))

    assert certified(least) and not certified(least - 1)
    assert least_questions(0, 0.05) == 0
