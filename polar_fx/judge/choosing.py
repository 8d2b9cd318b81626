"""Answering questions with choices, by the first layers where they are enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..program import Program
from ..questions import EncodedQuestion, Question, any_template
from ..questions.choices import best_choice
from ..questions.question import places_of
from .early_exit import ChoiceScores, EarlyExits

if TYPE_CHECKING:
    from ..compiled import CompiledModel
    from .teacher_forcing import TeacherForcing

_PART = 32  # questions at a time, whose states are held until all their layers have run


@dataclass(frozen=True)
class Chosen:
    """The answer to a question: the `place` of a choice and its text, the score of each choice, and
    the program that ran.

    Where all layers ran, scores are log-likelihoods (a character, for `choices-norm`); at an early
    exit they say how likely the whole model takes each choice, as logarithms.
    """

    place: int
    text: str
    scores: tuple[float, ...]
    program: Program


class Chooser:
    """Takes the choice of the highest score, as lm-evaluation-harness does (zero-shot).

    Args:
        compiled: the model; its `max_length` bounds question and choice.
        tokenizer: the model's.
        prompt: `choices` compares log-likelihoods as they are, `choices-norm` a character.
        early_exits: of tasks that may be answered after the first layers; the others, and questions
            of which these layers are not sure, are answered by the whole model, which goes on from
            there.

    Raises InputError for exits of another model or in another prompt.
    """

    def __init__(
        self,
        compiled: "CompiledModel",
        tokenizer: Any,
        *,
        prompt: str = "choices",
        early_exits: EarlyExits | None = None,
    ) -> None:
        from .teacher_forcing import TeacherForcing

        self.forcing, self.tokenizer, self.prompt = TeacherForcing(compiled), tokenizer, prompt
        self.early_exits = early_exits
        if early_exits is not None:
            early_exits.check(compiled.library, prompt)

    def choose(self, questions: Sequence[Question]) -> list[Chosen]:
        """An answer a question, in order. Raises InputError for one without choices."""
        encoded = [
            any_template(self.prompt, question.task).encode(self.tokenizer, question)
            for question in questions
        ]
        found: list[Chosen] = []
        for start in range(0, len(questions), _PART):
            part = slice(start, start + _PART)
            found += self._part(questions[part], encoded[part])
        return found

    def _part(
        self, questions: Sequence[Question], encoded: Sequence[EncodedQuestion]
    ) -> list[Chosen]:
        depth = self.forcing.compiled.depth
        whole = Program.identity(depth)
        found: dict[int, Chosen] = {}
        for task, places in places_of([question.task for question in questions]).items():
            early = None if self.early_exits is None else self.early_exits.tasks.get(task)
            if early is None or early.never:
                continue
            program = first_layers(early.num_steps, depth)
            scores = choice_scores(self.forcing, [encoded[i] for i in places], program=program)
            for i, shares in zip(places, early.answers(scores), strict=True):
                if shares is not None:
                    found[i] = _chosen(questions[i], shares, program=program)
        left = [i for i in range(len(questions)) if i not in found]
        scores = choice_scores(self.forcing, [encoded[i] for i in left], program=whole)
        for i, each in zip(left, scores, strict=True):
            found[i] = _chosen(questions[i], each.scores, program=whole)
        self.forcing.forget([each.id for each in encoded])
        return [found[i] for i in range(len(questions))]


def first_layers(num_steps: int, depth: int) -> Program:
    """The program that leaves after so many layers."""
    return Program.from_path(range(num_steps), depth)


def choice_scores(
    forcing: "TeacherForcing", encoded: Sequence[EncodedQuestion], *, program: Program
) -> list[ChoiceScores]:
    """Of each question by this program. Raises InputError for a question without choices."""
    scores = forcing.choice_scores([(each, program) for each in encoded])
    found = []
    for each, of_question in zip(encoded, scores, strict=True):
        key = each.choice
        if key is None:
            raise InputError(
                f"question {each.id!r} has no choices; encode it with a ChoiceTemplate"
            )
        found.append(ChoiceScores.of(of_question, key))
    return found


def _chosen(question: Question, scores: tuple[float, ...], *, program: Program) -> Chosen:
    best = best_choice(scores)
    return Chosen(best, question.choices[best], scores, program)
