"""Answers by scores of choices: the letter of the highest, its share, and draws."""

import math
from typing import Any

import numpy as np
import pytest

from evaluation_samples import IDENTITY, SHORT
from polar_fx.evaluation.answers import is_parsable, is_right, most_confident
from polar_fx.evaluation.choice_answers import ChoiceAnswerer
from polar_fx.questions import EncodedQuestion, Question

QUESTION = Question("q", "t", "?", ("so",), choices=("no", "so", "if"))
ROW = QUESTION, EncodedQuestion("q", (), (1,), ((1,),) * 3)
SCORES = {IDENTITY: (math.log(0.2), math.log(0.6), math.log(0.2)), SHORT: (-5.0, -5.2, math.nan)}


class Scores:
    """Of each program the scores above."""

    def choice_scores(self, pairs: Any) -> list[tuple[float, ...]]:
        return [SCORES[program] for _, program in pairs]


def test_the_highest_score_is_the_answer() -> None:
    answers = ChoiceAnswerer(Scores()).greedy([(ROW, IDENTITY), (ROW, SHORT)])  # type: ignore[arg-type]
    assert [a.text for a in answers] == ["B", "A"]
    assert [is_right(a, QUESTION) for a in answers] == [True, False]
    assert all(is_parsable(a, QUESTION) for a in answers)
    assert answers[0].log_likelihood == pytest.approx(math.log(0.6))
    assert answers[1].log_likelihood == pytest.approx(-math.log1p(math.exp(-0.2)))
    assert most_confident(answers) == 0


def test_draws_follow_the_shares() -> None:
    (drawn,) = ChoiceAnswerer(Scores()).sampled(  # type: ignore[arg-type]
        [ROW], IDENTITY, count=4000, temperature=0.5, seed=3
    )
    share = np.mean([a.text == "B" for a in drawn])
    assert share == pytest.approx(0.36 / 0.44, abs=0.03)
