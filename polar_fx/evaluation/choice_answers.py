"""Answers to questions with choices: what an `Answerer` generates, told by scores instead."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..program import Program
from ..questions.choices import best_choice, log_shares
from .answers import Answer, Row, letter

if TYPE_CHECKING:
    from ..judge.teacher_forcing import TeacherForcing


class ChoiceAnswerer:
    """Takes the highest score of each program, which needs no answer key.

    An answer's text is the letter of the choice, its log-likelihood the choice's share among all,
    so that votes and confidence work as over generated answers.
    """

    def __init__(self, forcing: "TeacherForcing") -> None:
        self.forcing = forcing

    def greedy(self, pairs: Sequence[tuple[Row, Program]]) -> list[Answer]:
        """An answer a pair, in order."""
        return [_answer(best_choice(scores), scores) for scores in self._scores(pairs)]

    def sampled(
        self, rows: Sequence[Row], program: Program, *, count: int, temperature: float, seed: int
    ) -> list[list[Answer]]:
        """`count` choices a question, drawn by their shares at a temperature, by one program."""
        rng = np.random.default_rng(seed)
        found = []
        for scores in self._scores([(row, program) for row in rows]):
            shares = np.exp(log_shares([score / temperature for score in scores]))
            drawn = rng.choice(len(scores), size=count, p=shares / shares.sum())
            found.append([_answer(int(place), scores) for place in drawn])
        return found

    def _scores(self, pairs: Sequence[tuple[Row, Program]]) -> list[tuple[float, ...]]:
        return self.forcing.choice_scores([(encoded, p) for (_, encoded), p in pairs])


def _answer(place: int, scores: Sequence[float]) -> Answer:
    return Answer(letter(place), 1, True, float(log_shares(scores)[place]))
