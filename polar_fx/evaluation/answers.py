"""Methods that need generated answers: votes and confidence over several programs, sampling, and
what graders make of an answer.

Single-shot methods are compared by teacher forcing, which asks for the accepted answer to the
token. Here answers are generated and graded, so that an answer in another form counts as well, and
it can be told whether a program reasons better or only writes the expected form more often.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..judge.by_generation import generate_arguments
from ..judge.grading import extract, grade
from ..program import Program
from ..questions.question import EncodedQuestion, Question
from ..questions.templates import Template

if TYPE_CHECKING:
    from ..compiled import CompiledModel

Row = tuple[Question, EncodedQuestion]


class Answers(Protocol):
    """Where answers come from: an `Answerer`, or for questions with choices a `ChoiceAnswerer`."""

    def greedy(self, pairs: Sequence[tuple[Row, Program]]) -> "list[Answer]":
        """An answer a pair, in order."""
        ...

    def sampled(
        self, rows: Sequence[Row], program: Program, *, count: int, temperature: float, seed: int
    ) -> "list[list[Answer]]":
        """`count` answers a question at a temperature, by one program."""
        ...


@dataclass(frozen=True)
class Answer:
    """What a program answered: the text up to the stop, its tokens, whether that stop came, and how
    sure the program was.

    `log_likelihood` is that of the tokens, in nats.
    """

    text: str
    num_tokens: int
    stopped: bool
    log_likelihood: float


class Answerer:
    """Generates answers, questions of one program and task together; `progress(count)` is called
    after each batch.
    """

    def __init__(
        self,
        compiled: "CompiledModel",
        tokenizer: Any,
        *,
        templates: Mapping[str, Template],
        batch: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.compiled, self.tokenizer, self.templates, self.batch = (
            compiled,
            tokenizer,
            templates,
            batch,
        )
        self.progress = progress or (lambda count: None)

    def greedy(self, pairs: Sequence[tuple[Row, Program]]) -> list[Answer]:
        """An answer a pair, in order."""
        return [each[0] for each in self._answers(pairs, {"do_sample": False})]

    def sampled(
        self, rows: Sequence[Row], program: Program, *, count: int, temperature: float, seed: int
    ) -> list[list[Answer]]:
        """`count` answers a question at a temperature, by one program."""
        options = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "num_return_sequences": count,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._answers([(row, program) for row in rows], options)

    def _answers(
        self, pairs: Sequence[tuple[Row, Program]], options: dict[str, Any]
    ) -> list[list[Answer]]:
        groups: dict[tuple[Program, str], list[int]] = defaultdict(list)
        for i, ((question, _), program) in enumerate(pairs):
            groups[program, question.task].append(i)
        found: dict[int, list[Answer]] = {}
        copies = options.get("num_return_sequences", 1)
        size = max(1, self.batch // copies)
        for (program, task), members in groups.items():
            members.sort(key=lambda i: len(pairs[i][0][1].prompt))
            for start in range(0, len(members), size):
                part = members[start : start + size]
                questions = [pairs[i][0][1] for i in part]
                made = self._generate(
                    questions, program, template=self.templates[task], options=options
                )
                found |= {i: made[at * copies : (at + 1) * copies] for at, i in enumerate(part)}
                self.progress(len(part))
        return [found[i] for i in range(len(pairs))]

    def _generate(
        self,
        questions: Sequence[EncodedQuestion],
        program: Program,
        *,
        template: Template,
        options: dict[str, Any],
    ) -> list[Answer]:
        stop = template.decode_stop(self.tokenizer)
        ids, arguments = generate_arguments(questions, self.tokenizer, stop=stop)
        arguments |= {**options, "return_dict_in_generate": True, "output_logits": True}
        out = self.compiled.generate(ids, program=program, **arguments)
        new = out.sequences[:, ids.shape[1] :]
        scores = (
            torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, new[..., None])[..., 0]
        )
        return [
            self._answer(row, of_row, stop=stop) for row, of_row in zip(new, scores, strict=True)
        ]

    def _answer(self, ids: torch.Tensor, scores: torch.Tensor, *, stop: Any) -> Answer:
        """Of a row that its batch may have carried on beyond its own stop."""
        count, stopped = len(ids), False
        for end in range(1, len(ids) + 1):
            if int(ids[end - 1]) in stop.token_ids or any(
                s in self.tokenizer.decode(ids[:end]) for s in stop.strings
            ):
                count, stopped = end, True
                break
        text = self.tokenizer.decode(ids[:count], skip_special_tokens=True)
        for string in stop.strings:
            text = text.partition(string)[0]
        return Answer(text, count, stopped, float(scores[:count].sum()))


def majority(answers: Sequence[Answer]) -> int:
    """The place of the answer that most give (as text, white space at the ends aside); of equals
    the earliest.
    """
    texts = [extract(a.text).answer for a in answers]
    counts = Counter(texts)
    return max(range(len(texts)), key=lambda i: (counts[texts[i]], -i))


def most_confident(answers: Sequence[Answer]) -> int:
    """The place of the answer whose tokens its own program finds likeliest on average."""
    return int(np.argmax([a.log_likelihood / max(1, a.num_tokens) for a in answers]))


def is_right(answer: Answer, question: Question) -> bool:
    """Whether the answer is one of the accepted ones, in whatever form; of choices, the letter."""
    if question.choices:
        return answer.text == letter(question.choices.index(question.right_choice))
    return grade(answer.text, question)


def is_parsable(answer: Answer, question: Question) -> bool:
    """Whether an answer of the asked kind can be read: it ended, and where numbers are accepted it
    is one.
    """
    if question.choices:
        return answer.stopped
    numeric = all(_is_number(accepted) for accepted in question.answers)
    text = extract(answer.text).answer
    return answer.stopped and bool(text.strip()) and (not numeric or _is_number(text))


def letter(place: int) -> str:
    """A choice's name: A, B ..."""
    return chr(ord("A") + place)


def _is_number(text: str) -> bool:
    return text.strip().lstrip("+-").replace(",", "").isdigit()


@dataclass(frozen=True)
class Rescues:
    """What generation and grading make of a method's gains over the identity, in questions.

    `reasoning`: graded right, where the identity's graded answer is wrong. `format`: exact, where
    the identity's answer is right when graded but not in the expected form, so that teacher forcing
    calls it wrong. `lost`: graded wrong, and the identity's
    graded answer is right.
    """

    reasoning: int
    format: int
    lost: int

    @classmethod
    def of(
        cls,
        identity_exact: Sequence[bool],
        identity_graded: Sequence[bool],
        *,
        exact: Sequence[bool],
        graded: Sequence[bool],
    ) -> "Rescues":
        """From four flags a question."""
        reasoning = format_alone = lost = 0
        rows = zip(identity_exact, identity_graded, exact, graded, strict=True)
        for was_exact, was_graded, is_exact, is_graded in rows:
            reasoning += is_graded and not was_graded
            format_alone += is_exact and not was_exact and was_graded
            lost += was_graded and not is_graded
        return cls(reasoning, format_alone, lost)
