"""Answering questions with choices, by the first layers where they are enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
        tasks = [question.task for question in questions]
        answers = answer_choices(self.forcing, encoded, tasks=tasks, early_exits=self.early_exits)
        found: list[Chosen] = []
        for question, answer in zip(questions, answers, strict=True):
            best = best_choice(answer.scores)
            found.append(Chosen(best, question.choices[best], answer.scores, answer.program))
        return found


class ChoiceAnswer(NamedTuple):
    """What is known of each choice of a question: its score, as `Chosen` has it, and whether greedy
    decoding by the `program` that ran gives its scored end.
    """

    scores: tuple[float, ...]
    greedy: tuple[bool, ...]
    program: Program


def answer_choices(
    forcing: "TeacherForcing",
    encoded: Sequence[EncodedQuestion],
    *,
    tasks: Sequence[str],
    early_exits: EarlyExits | None,
) -> list[ChoiceAnswer]:
    """An answer a question, of these tasks, by an early exit that is sure enough or else by all
    layers, which go on from there. Nothing of the questions is kept.

    Raises InputError for a question without choices, and what judging raises.
    """
    depth = forcing.compiled.depth
    found: dict[int, ChoiceAnswer] = {}
    for task, places in places_of(tasks).items():
        early = None if early_exits is None else early_exits.tasks.get(task)
        if early is None or early.never:
            continue
        program = first_layers(early.num_steps, depth)
        some = [encoded[i] for i in places]
        ends = _ends(forcing, some, program=program)
        shares = early.answers([scores for scores, _ in ends])
        for i, own, (_, greedy) in zip(places, shares, ends, strict=True):
            if own is not None:
                found[i] = ChoiceAnswer(own, greedy, program)
    whole = Program.identity(depth)
    left = [i for i in range(len(encoded)) if i not in found]
    ends = _ends(forcing, [encoded[i] for i in left], program=whole)
    for i, (scores, greedy) in zip(left, ends, strict=True):
        found[i] = ChoiceAnswer(scores.scores, greedy, whole)
    forcing.forget([each.id for each in encoded])
    return [found[i] for i in range(len(encoded))]


def first_layers(num_steps: int, depth: int) -> Program:
    """The program that leaves after so many layers."""
    return Program.from_path(range(num_steps), depth)


def choice_scores(
    forcing: "TeacherForcing", encoded: Sequence[EncodedQuestion], *, program: Program
) -> list[ChoiceScores]:
    """Of each question by this program. Raises InputError for a question without choices."""
    return [scores for scores, _ in _ends(forcing, encoded, program=program)]


def _ends(
    forcing: "TeacherForcing", encoded: Sequence[EncodedQuestion], *, program: Program
) -> list[tuple[ChoiceScores, tuple[bool, ...]]]:
    """Of each question the scores, and whether greedy decoding gives each choice."""
    found = []
    ends = forcing.choice_ends([(each, program) for each in encoded])
    for each, of_question in zip(encoded, ends, strict=True):
        greedy, likelihoods = zip(*of_question, strict=True)
        key = each.require_choice()
        found.append((ChoiceScores.of(key.scores(likelihoods), key), greedy))
    return found
