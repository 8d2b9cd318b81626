"""The model of a job: loaded once, compiled for rows as long as its longest question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..output.plain_text import dtype_name
from .questions import (
    encode,
    measured_difficulty,
    measuring_questions,
    row_tokens,
    templates_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import EncodedQuestion, Question, Template
    from ..search.workers import OpenWorkplace, Workplace


@dataclass(frozen=True, kw_only=True)
class OtherQuestions:
    """Questions that the model must also hold, in the built-in prompt of that name."""

    questions: "Sequence[Question]" = ()
    prompt: str = "plain"


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A workplace with its model, and the questions of the job as tokens, in their order."""

    place: "OpenWorkplace"
    tokenizer: Any
    encoded: "list[EncodedQuestion]"
    measuring: "list[Question]"
    """Questions that tell the difficulty of those that are asked, and the same as tokens:"""
    measuring_encoded: "list[EncodedQuestion]"

    def with_difficulty(self, questions: "Sequence[Question]") -> "list[Question]":
        """The questions, those of built-in tasks with the level of the identity's accuracy on train
        questions of their cell.
        """
        return measured_difficulty(
            questions, self.measuring, encoded=self.measuring_encoded, place=self.place
        )


def open_job(
    workplace: "Workplace",
    questions: "Sequence[Question]",
    *,
    templates: "Mapping[str, Template]",
    console: "Console",
    workers: int = 1,
    generated: bool = False,
    other: OtherQuestions | None = None,
) -> OpenJob:
    """Load and compile what `workplace` names, for rows that hold these questions.

    `dtype`, `max_length`, `templates` and, for several workers, `threads` of the workplace are
    filled in. `generated` leaves room for answers of any length. Raises what `polar_fx.load` and
    `polar_fx.compile` raise.
    """
    import torch
    from transformers.utils import logging

    from ..models import position_limit

    logging.disable_progress_bar()  # the console says what is being done

    with console.status("loading the model ..."):
        model, tokenizer = workplace.load()
    encoded, measuring = (
        encode(tokenizer, questions, templates=templates),
        measuring_questions(questions),
    )
    measuring_encoded = encode(tokenizer, measuring, templates=templates)
    limit = position_limit(model)
    length = row_tokens(
        [*encoded, *measuring_encoded],
        [*questions, *measuring],
        templates=templates,
        limit=limit,
        generated=generated,
    )
    if other is not None and other.questions:
        theirs = templates_of(other.prompt, other.questions)
        rows = encode(tokenizer, other.questions, templates=theirs)
        needed = row_tokens(rows, other.questions, templates=theirs, limit=limit, generated=False)
        length = max(length, needed)
    threads = workplace.threads
    if threads is None and workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
    workplace = replace(
        workplace,
        dtype=dtype_name(model.dtype),
        max_length=length,
        threads=threads,
        templates=dict(templates),
    )
    with console.status("compiling ..."):
        place = workplace.open(questions, (model, tokenizer))
        for batch in (1, 2):
            place.compiled.warmup((None,), batch)
    return OpenJob(
        place=place,
        tokenizer=tokenizer,
        encoded=encoded,
        measuring=measuring,
        measuring_encoded=measuring_encoded,
    )
