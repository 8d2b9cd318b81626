"""What running one program on one question gave, and the reward a search makes of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..questions.choices import best_choice


@dataclass(frozen=True, slots=True)
class Verdict:
    """`correct`: whether greedy decoding gives an accepted answer.

    Where the answer was scored by teacher forcing: `log_likelihood` is the log-probability, in nats
    (<= 0), of the accepted continuation that greedy decoding gives, or else of the likeliest one;
    `margin` is the smallest lead, in logits, of its tokens over every other token (at least 0 when
    greedy decoding gives it). Where it was generated and graded, both are None. Of a question with
    choices (`choice_verdict`), `correct` is whether the right one scores highest, `log_likelihood`
    its share among the choices, and `margin` its lead over the best other one, in nats (nats a
    character where lengths count).
    """

    correct: bool
    log_likelihood: float | None = None
    margin: float | None = None


def choice_verdict(scores: Sequence[float], right: int) -> Verdict:
    """Of the scores of all choices, log-likelihoods as they are or by length; the highest wins, of
    equals the first (as lm-evaluation-harness' acc and acc_norm have it).
    """
    known = [-math.inf if math.isnan(s) else s for s in scores]
    highest = max(known)
    if math.isinf(highest):
        return Verdict(False, math.nan, math.nan)  # no choice can be told from another
    total = highest + math.log(sum(math.exp(s - highest) for s in known))
    others = max(s for i, s in enumerate(known) if i != right)
    return Verdict(best_choice(scores) == right, known[right] - total, known[right] - others)


# A number in 0..1, as UCB asks for.
Reward = Callable[[Verdict], float]


def exact(verdict: Verdict) -> float:
    """1 for a right answer, else 0 (PoLar, section 3)."""
    return float(verdict.correct)


def likelihood(verdict: Verdict) -> float:
    """The probability of the right answer."""
    if verdict.log_likelihood is None:
        raise InputError(
            "the reward 'likelihood' needs teacher-forced verdicts; use the reward 'exact' with "
            "generated answers"
        )
    return 0.0 if math.isnan(verdict.log_likelihood) else math.exp(verdict.log_likelihood)


def margin(verdict: Verdict) -> float:
    """The smallest lead of the right answer's tokens, through a logistic function: above 1/2 when
    the answer is right.
    """
    if verdict.margin is None:
        raise InputError(
            "the reward 'margin' needs teacher-forced verdicts; use the reward 'exact' with "
            "generated answers"
        )
    return 0.0 if math.isnan(verdict.margin) else 1 / (1 + math.exp(-max(-700.0, verdict.margin)))


REWARDS: dict[str, Reward] = {"exact": exact, "likelihood": likelihood, "margin": margin}


def get_reward(name: str) -> Reward:
    """A reward by name. Raises InputError naming the known ones."""
    if name not in REWARDS:
        raise InputError(f"unknown reward {name!r}; use one of {', '.join(REWARDS)}")
    return REWARDS[name]
