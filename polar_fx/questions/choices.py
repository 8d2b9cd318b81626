"""Questions with choices: how they are asked, and which tokens are compared.

As lm-evaluation-harness builds them (0.4, tasks of output type multiple_choice), zero-shot: each
choice is a continuation of the question, and the likeliest one is the answer. Its `acc` takes
log-likelihoods as they are, its `acc_norm` divides each by the choice's length in characters.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, NoReturn

import numpy as np

from ..errors import InputError
from .question import ChoiceKey, EncodedQuestion, Question


@dataclass(frozen=True)
class ChoiceTemplate:
    """A way to ask for one of several choices. Change `version` with any change of the others.

    `prompt` is the text before the choices, with `{question}` in it; a choice follows after a
    space. With `blank`, a mark in the question's own text, there is no prompt: each choice stands
    in its place, and what follows the mark, the same for all, is scored (partial evaluation, as
    WinoGrande is run). `normalized` divides log-likelihoods by the choice's characters; after a
    blank there is nothing to divide by. Raises InputError on a bad field.
    """

    name: str
    version: int
    prompt: str = "{question}"
    blank: str = ""
    normalized: bool = False

    max_new_tokens: ClassVar[int] = 0
    """Nothing is generated."""

    def __post_init__(self) -> None:
        if (count := self.prompt.count("{question}")) != 1:
            raise InputError(
                f"prompt of the choice template {self.name!r} holds {{question}} {count} times; "
                "write it once"
            )

    @property
    def key(self) -> str:
        """Name and version, such as `choices:piqa@1`."""
        return f"{self.name}@{self.version}"

    def pairs(self, question: Question) -> list[tuple[str, str]]:
        """Context and continuation of each choice, as texts. Raises InputError."""
        where = f"prompt template {self.key}, question {question.id!r}: "
        if len(question.choices) < 2 or question.answers[:1] != (question.right_choice,):
            raise InputError(f"{where}it has no choices to compare; load it from a row with them")
        text = question.question.strip()
        if not self.blank:
            context = self.prompt.replace("{question}", text)
            return [(context, f" {choice}") for choice in question.choices]
        before, mark, after = text.partition(self.blank)
        if not mark or not after.strip():
            raise InputError(
                f"{where}{text!r:.80} has no {self.blank!r} with text after it; mark the blank so"
            )
        return [(before + choice, f" {after.strip()}") for choice in question.choices]

    def encode(self, tokenizer: Any, question: Question) -> EncodedQuestion:
        """A question as token ids; see `encode_all`."""
        return self.encode_all(tokenizer, [question])[0]

    def encode_all(self, tokenizer: Any, questions: Iterable[Question]) -> list[EncodedQuestion]:
        """Questions as token ids.

        The prompt is what the contexts of all choices begin with, a target the rest of its context
        and the continuation, of which the continuation is scored: the tokens of both texts
        together, after as many as the context alone has. Raises InputError for a question without
        choices, or whose choices share no beginning.
        """
        return [self._encode(tokenizer, question) for question in questions]

    def decode_stop(self, tokenizer: Any) -> NoReturn:
        """Raise InputError: nothing is generated."""
        raise InputError(
            f"prompt template {self.key} compares choices, which are not generated; judge by "
            "teacher forcing, or ask in the prompt 'direct'"
        )

    def _encode(self, tokenizer: Any, question: Question) -> EncodedQuestion:
        rows = []
        for context, continuation in self.pairs(question):
            before = tuple(tokenizer(context).input_ids)
            rows.append((before, tuple(tokenizer(context + continuation).input_ids)[len(before) :]))
        contexts = [before for before, _ in rows]
        same = takewhile(lambda ids: len(set(ids)) == 1, zip(*contexts, strict=False))
        prompt = tuple(ids[0] for ids in same)
        if not prompt or not all(scored for _, scored in rows):
            what = "its choices share no first token" if not prompt else "a choice has no tokens"
            raise InputError(
                f"prompt template {self.key}, question {question.id!r}: {what}; begin the question "
                "with a text, and give every choice one"
            )
        right = question.choices.index(question.right_choice)
        num_scored = tuple(len(scored) for _, scored in rows)
        lengths = tuple(float(len(c)) if self._divides else 1.0 for c in question.choices)
        characters = tuple(len(c) for c in question.choices)
        targets = tuple(before[len(prompt) :] + scored for before, scored in rows)
        key = ChoiceKey(right, num_scored, lengths, characters)
        return EncodedQuestion(question.id, (), prompt, targets, key)

    @property
    def _divides(self) -> bool:
        return self.normalized and not self.blank


_QUESTION_ANSWER = "Question: {question}\nAnswer:"
# What lm-evaluation-harness asks (lm_eval/tasks: arc, openbookqa, piqa, siqa, winogrande).
_PROMPTS = {
    "arc_easy": _QUESTION_ANSWER,
    "arc_challenge": _QUESTION_ANSWER,
    "openbookqa": "{question}",
    "piqa": _QUESTION_ANSWER,
    "social_iqa": "Q: {question}\nA:",
}
_BLANKS = {"winogrande": "_"}

CHOICE_PROMPTS = ("choices", "choices-norm")


def choice_template(name: str, task: str = "") -> ChoiceTemplate:
    """The prompt of a task with choices: `choices` (lm-eval's acc) or `choices-norm` (acc_norm).

    Tasks that lm-eval does not know, such as a user's own, are asked as ARC is. Raises InputError
    for another name.
    """
    if name not in CHOICE_PROMPTS:
        raise InputError(f"unknown prompt {name!r} for choices; use {' or '.join(CHOICE_PROMPTS)}")
    known = task if task in _PROMPTS or task in _BLANKS else "any"
    return ChoiceTemplate(
        f"{name}:{known}",
        1,
        _PROMPTS.get(task, "{question}" if task in _BLANKS else _QUESTION_ANSWER),
        blank=_BLANKS.get(task, ""),
        normalized=name == "choices-norm",
    )


def best_choice(scores: Sequence[float]) -> int:
    """The place of the highest score, of equals the first; one that is no number never wins."""
    return max(range(len(scores)), key=lambda i: (scores[i] == scores[i], scores[i], -i))


def log_shares(scores: Sequence[float]) -> np.ndarray:
    """The logarithm of each choice's share among all, f64[C]; scores that are no numbers have
    none.
    """
    known = np.array([s if math.isfinite(s) else -1e9 for s in scores])
    return known - known.max() - math.log(np.exp(known - known.max()).sum())
