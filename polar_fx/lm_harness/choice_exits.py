"""Questions with choices among lm-eval's requests, answered by the first layers where they are
enough.

A harness asks for the log-likelihood of each choice by itself, and then compares those of one
document. An exit does not tell log-likelihoods of the whole model; it tells how likely the whole
model takes each choice, and these numbers are comparable among the choices of one document alone.
That is all that `acc` and `acc_norm` do with them. What compares across documents, or with anything
else (`acc_mutual_info`, `brier_score`, `likelihood`, perplexities), means nothing where a document
was answered at an exit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import Any

from ..compiled import CompiledModel
from ..errors import InputError
from ..judge.choosing import answer_choices
from ..judge.early_exit import EarlyExits
from ..judge.teacher_forcing import TeacherForcing
from ..program import Program
from ..questions.question import ChoiceKey, EncodedQuestion

Pair = Callable[[str, str], tuple[list[int], list[int]]]
"""Context and continuation, as texts, to the tokens of both."""
_PART = 32  # documents at a time, whose states are held until all their layers have run


@dataclass(frozen=True)
class ChoiceGroup:
    """The requests of one document's choices: their `task`, the question as tokens, and for each
    choice the places of its requests among all.
    """

    task: str
    encoded: EncodedQuestion
    places: tuple[tuple[int, ...], ...]


class ChoiceExits:
    """Answers lm-eval's choices by early exits of a compiled model.

    `early_exits` are those, or the path of the file that `python -m polar_fx exits` wrote; its
    tasks are lm-eval's by name. In a file of the prompt `choices-norm`, exits take the choice that
    `acc_norm` takes, else that of `acc`: the other metric of a document that was answered at an
    exit is not told. Raises InputError for exits of another model, for a file that cannot be read,
    or where the model runs another program than the identity or dispatches.
    """

    def __init__(self, compiled: CompiledModel, early_exits: EarlyExits | str | Path) -> None:
        if not isinstance(early_exits, EarlyExits):
            early_exits = EarlyExits.load(early_exits)
        # the prompt is lm-eval's; whether exits learned in the same one is theirs who ask
        early_exits.check(compiled.library, early_exits.prompt)
        if compiled.dispatcher is not None or not compiled.default_program.is_identity:
            raise InputError(
                "early exits are of the whole model, and this one runs "
                f"{compiled.default_program if compiled.dispatcher is None else 'a dispatcher'}; "
                "compile it without a predictor, policy or program, or leave exits out"
            )
        self.early_exits, self.forcing = early_exits, TeacherForcing(compiled)

    def depths(self) -> dict[str, int | None]:
        """By task the number of layers before its exit; None where it was refused."""
        return {
            task: None if each.never else each.num_steps
            for task, each in self.early_exits.tasks.items()
        }

    def groups(self, requests: Sequence[Any], encode: Pair) -> list[ChoiceGroup]:
        """The documents among these requests (lm-eval's `Instance`) that may be answered at an
        exit: of a task that has one, with at least two continuations of one context that is not
        empty, all of which fit. The other requests belong to none.

        Contexts that differ from choice to choice, such as WinoGrande's, are in none either: a
        request does not tell which part of its context is the choice.
        """
        found: dict[tuple[str, Any, str], dict[tuple[int, str], list[int]]] = {}
        for place, request in enumerate(requests):
            context, continuation = request.args[:2]
            early = self.early_exits.tasks.get(request.task_name or "")
            if early is None or early.never or request.doc_id is None or not context:
                continue
            choices = found.setdefault((request.task_name, request.doc_id, context), {})
            # a request that is repeated has the same index
            choices.setdefault((request.idx, continuation), []).append(place)
        groups = []
        for (task, doc, context), choices in found.items():
            texts = [continuation for _, continuation in choices]
            name = f"{task} {doc}"
            # of a document that a cache has answered in part, the rest is no question
            whole = sorted({index for index, _ in choices}) == list(range(len(texts)))
            if len(texts) < 2 or not whole:
                continue
            if own := self._encoded(name, context, texts=texts, encode=encode):
                groups.append(ChoiceGroup(task, own, tuple(map(tuple, choices.values()))))
        return groups

    def answers(
        self, groups: Sequence[ChoiceGroup]
    ) -> Iterator[tuple[ChoiceGroup, list[tuple[float, bool]], Program]]:
        """Of each group, in order, what lm-eval is told of each choice, and the program that ran.

        Where all layers ran, these are log-likelihoods in nats. At an exit they are logarithms of
        how likely the whole model takes each choice, times what a metric divides by (1, or the
        choice's characters); greedy is what the layers up to the exit give.
        """
        for start in range(0, len(groups), _PART):
            part = groups[start : start + _PART]
            tasks = [group.task for group in part]
            found = answer_choices(
                self.forcing,
                [group.encoded for group in part],
                tasks=tasks,
                early_exits=self.early_exits,
            )
            for group, answer in zip(part, found, strict=True):
                lengths = group.encoded.require_choice().lengths
                told = zip(map(mul, answer.scores, lengths), answer.greedy, strict=True)
                yield group, list(told), answer.program

    def _encoded(
        self, name: str, context: str, *, texts: Sequence[str], encode: Pair
    ) -> EncodedQuestion | None:
        """A question as tokens; None where a choice has no token, its characters are none, or the
        row does not fit.
        """
        pairs = [encode(context, text) for text in texts]
        contexts, targets = zip(*pairs, strict=True)
        characters = tuple(len(text.removeprefix(" ")) for text in texts)
        runner = self.forcing.compiled.runner
        room = runner.pool.max_length if runner.switch is None else runner.switch
        longest = len(contexts[0]) + max(map(len, targets)) - 1
        if not contexts[0] or not all(targets) or not all(characters) or longest > room:
            return None
        lengths = (1.0,) * len(texts)
        if self.early_exits.prompt == "choices-norm":
            lengths = tuple(map(float, characters))
        # which choice is right is not known here, and nothing asks for it
        key = ChoiceKey(0, tuple(map(len, targets)), lengths, characters)
        return EncodedQuestion(name, (), tuple(contexts[0]), tuple(map(tuple, targets)), key)
