"""What an evaluation comes to, in words: cases worked by hand."""

import numpy as np

from polar_fx.evaluation.choices import BEST_STATIC, SELECTOR_ACCURACY
from polar_fx.evaluation.conclusion import conclusion
from polar_fx.stats.arms import IDENTITY, ArmResult

N = 400
BASE = np.arange(N) < 200  # half of the questions are right as they are


def arm(name: str, right: np.ndarray, *, steps: float = 30.0) -> ArmResult:
    identity = np.full(N, 30.0)
    return ArmResult(name, "mine", right, BASE, np.full(N, steps), identity)


def arms(accurate: np.ndarray, *more: ArmResult, steps: float = 31.5) -> list[ArmResult]:
    first = [arm(IDENTITY, BASE), arm(SELECTOR_ACCURACY, accurate, steps=steps)]
    return [*first, *more, arm(BEST_STATIC, BASE, steps=33.0)]


def test_a_gain_is_said_with_its_interval() -> None:
    said = conclusion(arms(np.arange(N) < 240)).split("\n")
    assert said[0] == "400 test questions of 1 task"
    assert said[1] == "the model as it is: 50.0 % right [45.1, 54.9], 30.0 steps (100 %)"
    assert said[2].startswith("policy accuracy: 60.0 % right [55.1, 64.7], 31.5 steps (105 %), +10")
    assert said[3] == "the best program for all: 50.0 % right [45.1, 54.9], 33.0 steps (110 %)"
    assert (
        said[4]
        == "Verdict: the predictor clearly answers more questions than the model does as it is."
    )


def test_a_loss_and_a_difference_that_is_not_clear() -> None:
    assert "do not use the policy accuracy" in conclusion(arms(np.arange(N) < 150))
    other = BASE.copy()
    other[[0, 1, 300]] = ~other[[0, 1, 300]]
    assert "no gain or loss of the policy accuracy is clear" in conclusion(arms(other))


def test_the_model_as_it_is_on_every_question() -> None:
    assert "because no program was shown" in conclusion(arms(BASE, steps=30.0))


def test_the_cheapest_policy_that_is_close() -> None:
    costly = np.arange(N) < 150
    priced = "selector: mean steps <= "
    saving = [
        arm(f"{priced}0.9", BASE, steps=27.0),
        arm(f"{priced}0.8", BASE, steps=24.0),
        arm(f"{priced}0.7", costly, steps=21.0),
    ]
    said = conclusion(arms(np.arange(N) < 240, *saving))
    assert "policy mean_steps<=0.8, the cheapest that is close: 50.0 % right" in said
    assert said.endswith("20 % of the steps can be saved at a loss of less than 1.5 points.")
