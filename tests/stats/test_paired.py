"""Arms against the identity, against numbers found by hand and against slower ways to find them."""

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from paired_samples import pairs
from places import ROOT
from polar_fx.errors import InputError
from polar_fx.stats.intervals import Share, wilson
from polar_fx.stats.paired import (
    Estimate,
    compare,
    holm,
    mcnemar,
)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (6, 2, 2 * (1 + 8 + 28) / 256),
        (3, 3, 1.0),
        (8, 1, 20 / 512),
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-14)


def test_mcnemar_of_many_pairs_is_near_the_normal_tail() -> None:
    z = (5_200 - 4_800 - 1) / 100  # with continuity correction
    assert mcnemar(5_200, 4_800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 take factors 4 3 2 1: .04 .06 .06 .06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
    with pytest.raises(InputError, match=r"p-value of nan"):
        holm([0.1, math.nan])


def test_compare_counts() -> None:
    paired = compare(*pairs(6, 2, both=10, neither=2))
    assert (paired.n, paired.gained, paired.lost, paired.discordance) == (20, 6, 2, 0.4)
    assert (paired.method, paired.identity) == (Share(16, 20), Share(12, 20))
    assert paired.gain.value == paired.score.value == pytest.approx(20.0)
    assert (
        paired.p_value == pytest.approx(74 / 256)
        and paired.steps is None
        and paired.step_ratio is None
    )
    assert (paired.to_dict()["method"]["low"], paired.to_dict()["method"]["high"]) == wilson(16, 20)


def test_the_bootstrap_interval_has_the_quantiles_of_the_exact_distribution() -> None:
    """All 3^4 multinomial outcomes of 4 questions: one gained, one lost, two neither."""
    right, identity = pairs(1, 1, both=1, neither=1)
    exact = sorted(25.0 * sum(draw) for draw in itertools.product([1, -1, 0, 0], repeat=4))
    cut = len(exact) * 25 // 1000  # 2.5 %
    paired = compare(right, identity)
    assert (paired.gain.low, paired.gain.high) == (exact[cut], exact[-cut - 1]) == (-75, 75)


def test_the_bootstrap_agrees_with_drawing_questions() -> None:
    rng = np.random.default_rng(3)
    right, identity, steps = rng.random(400) < 0.6, rng.random(400) < 0.5, rng.integers(10, 40, 400)
    base = 30 + (steps > 30)
    paired = compare(right, identity, steps=steps, identity_steps=base)
    drawn = rng.integers(0, 400, (20_000, 400))
    gain = 100 * (right.astype(float) - identity)[drawn].mean(axis=1)
    ratio = steps[drawn].mean(axis=1) / base[drawn].mean(axis=1)
    assert (paired.gain.low, paired.gain.high) == pytest.approx(
        np.percentile(gain, [2.5, 97.5]), abs=0.3
    )
    assert paired.step_ratio is not None and paired.steps is not None
    assert (paired.step_ratio.low, paired.step_ratio.high) == pytest.approx(
        np.percentile(ratio, [2.5, 97.5]), abs=2e-3
    )
    assert (
        paired.step_ratio.value == steps.mean() / base.mean() and paired.steps.value == steps.mean()
    )
    assert paired.steps.low < paired.steps.value < paired.steps.high


def test_the_ratio_of_steps_is_resampled_in_pairs() -> None:
    paired = compare(
        *pairs(5, 5, both=5, neither=5), steps=np.arange(1, 21), identity_steps=2 * np.arange(1, 21)
    )
    assert paired.step_ratio == Estimate(0.5, 0.5, 0.5)
    assert paired.steps is not None and paired.steps.low < 10 < 11 < paired.steps.high


def test_strata_keep_the_number_of_questions_of_each_task() -> None:
    """Every question of one task gained, of the other none: within tasks nothing varies."""
    right, identity = np.array([True] * 50 + [False] * 50), np.zeros(100, bool)
    tasks = ["addition"] * 50 + ["sequences"] * 50
    assert compare(right, identity, strata=tasks).gain == Estimate(50.0, 50.0, 50.0)
    free = compare(right, identity).gain
    assert free.low == pytest.approx(40, abs=1.1) and free.high == pytest.approx(60, abs=1.1)


def test_the_seed_decides_and_steps_do_not() -> None:
    rng = np.random.default_rng(0)
    right, identity = rng.random(997) < 0.5, rng.random(997) < 0.5
    steps = rng.random(997)
    plain = compare(right, identity, seed=1, resamples=300)
    assert plain == compare(right, identity, seed=1, resamples=300)
    assert (
        compare(right, identity, seed=1, resamples=300, steps=steps, identity_steps=1).gain
        == plain.gain
    )
    assert compare(right, identity, seed=2, resamples=300).gain != plain.gain


def _likelihood_score(gained: int, lost: int, *, n: int, delta: float) -> float:
    """Tango's score, with the share of lost pairs found by trying many."""
    lost_share = np.linspace(max(0, -delta), (1 - delta) / 2, 400_001)[1:-1]
    won_share, same = lost_share + delta, 1 - 2 * lost_share - delta
    log = (
        gained * np.log(won_share) + lost * np.log(lost_share) + (n - gained - lost) * np.log(same)
    )
    best = lost_share[np.argmax(log)]
    return (gained - lost - n * delta) / math.sqrt(n * (2 * best + delta * (1 - delta)))


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(12, 2, 50), (9, 1, 44), (3, 40, 100), (0, 4, 30)]
)
def test_the_score_interval_ends_where_the_score_does(gained: int, lost: int, n: int) -> None:
    score = compare(*pairs(gained, lost, both=n - gained - lost, neither=0), resamples=1).score
    ends = [
        _likelihood_score(gained, lost, n=n, delta=end / 100) for end in (score.low, score.high)
    ]
    assert ends == pytest.approx([1.95996, -1.95996], abs=2e-3)


def test_the_score_interval_without_discordant_pairs_is_wilsons() -> None:
    score = compare(*pairs(0, 0, both=60, neither=40), resamples=10).score
    assert score.high == pytest.approx(100 * wilson(0, 100)[1]) and score.low == pytest.approx(
        -score.high
    )
    assert compare(*pairs(5, 0, both=0, neither=0), resamples=10).score.high == 100
    assert compare(*pairs(0, 5, both=0, neither=0), resamples=10).score.low == -100


@pytest.mark.parametrize(
    ("right", "identity", "more", "words"),
    [
        ([], [], {}, "right is empty"),
        ([True], [True, False], {}, "identity_right has 2 values for 1 questions"),
        ([1, 0], [True, False], {}, "right holds int64 values; give booleans"),
        ([True, None], [True, False], {}, "right holds object"),
        ([[True], [True, False]], [True], {}, "right cannot be read"),
        ([[True]], [[True]], {}, r"shape \[1, 1\]"),
        ([True], [True], {"steps": [math.nan], "identity_steps": 3}, r"steps\[0\] is nan"),
        ([True], [True], {"steps": [1, 2], "identity_steps": 3}, "steps has 2 values"),
        ([True], [True], {"steps": [-1], "identity_steps": 3}, r"steps\[0\] is -1"),
        ([True], [True], {"steps": ["a"], "identity_steps": 3}, "steps cannot be read"),
        ([True], [True], {"steps": [1], "identity_steps": 0}, "identity_steps has a 0"),
        ([True], [True], {"steps": [1]}, "steps of one side only"),
        ([True], [True], {"strata": ["a", "b"]}, "strata has 2 values"),
        ([True], [True], {"resamples": 0}, "0 resamples"),
    ],
)
def test_compare_refuses(right: Any, identity: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        compare(right, identity, **more)


@pytest.mark.child_process
def test_neither_torch_nor_matplotlib_is_needed() -> None:
    code = (
        "import sys, polar_fx.stats.tables, polar_fx.stats.calibration\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
