"""Questions, as text and as tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..output.digest import digest

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a task. `answers` are the accepted final answers as text, the preferred one first.

    `difficulty` is 1 (easiest) to 5, None where it was not measured; `cell` names the kind of
    question within its task, such as "2x1 digits": rows of one cell share a measured base accuracy.
    `choices`, where there are any, are what may be answered, the right one among them. `split` is
    the one that its file names; None leaves that to `split_of`.
    """

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    difficulty: int | None = None
    cell: str = ""
    choices: tuple[str, ...] = ()
    split: Split | None = None

    @property
    def right_choice(self) -> str:
        """The preferred answer if it is one of the choices; else an empty text."""
        return next((answer for answer in self.answers[:1] if answer in self.choices), "")


def digest_of(questions: Iterable[Question]) -> str:
    """What tells these questions and their answers from others, in whatever order they come."""
    return digest({q.id: [q.question, *q.answers, *q.choices] for q in questions})


def places_of(tasks: Sequence[str]) -> dict[str, list[int]]:
    """Where each task's questions stand, of the tasks of all questions; tasks in the order in which
    they come first.
    """
    found: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        found.setdefault(task, []).append(place)
    return found


@dataclass(frozen=True, slots=True)
class ChoiceKey:
    """Which of an encoded question's targets are its choices' scores, one target a choice.

    `right` is the place of the right one. Of each target the last `scored` tokens count, and their
    log-likelihood is divided by `lengths`. `characters` are in each choice.
    """

    right: int
    scored: tuple[int, ...]
    lengths: tuple[float, ...]
    characters: tuple[int, ...]

    def scores(self, likelihoods: Sequence[float]) -> tuple[float, ...]:
        """What is compared, of the log-likelihoods of the targets' scored ends, in nats."""
        return tuple(each / n for each, n in zip(likelihoods, self.lengths, strict=True))


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A question under a prompt, as token ids.

    The prompt is `prefix + prompt`: `prefix` is what all questions of a task begin with
    (instructions, examples; it may be empty), `prompt` this question's own part. `targets` are the
    continuations that count as right when greedy decoding gives exactly one of them: answer, then
    stop token. None is empty. With `choice`, targets are the choices instead, which are compared.
    """

    id: str
    prefix: tuple[int, ...]
    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    choice: ChoiceKey | None = None

    def require_choice(self) -> ChoiceKey:
        """Its key. Raises InputError for a question without choices."""
        if self.choice is None:
            raise InputError(
                f"question {self.id!r} has no choices to score; encode it with a ChoiceTemplate"
            )
        return self.choice
