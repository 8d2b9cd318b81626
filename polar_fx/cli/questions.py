"""Questions of a command: which are asked, how, and what their difficulty is."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import whole

if TYPE_CHECKING:
    from ..questions import EncodedQuestion, PromptTemplate, Question
    from ..search.records.records import SearchHeader
    from ..search.workers import OpenWorkplace

_LENGTH_BUCKET = 64
_PER_CELL = 60  # questions of the train split that measure a cell's difficulty


def add_question_arguments(parser: argparse.ArgumentParser, default: str) -> Any:
    """--task, --data, --questions, --prompt; `default` says how many questions there are."""
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--task", action="append", metavar="NAME", help="built-in task; may be given several times"
    )
    asked.add_argument(
        "--data",
        action="append",
        type=Path,
        metavar="FILE",
        help="JSON lines with question and answer",
    )
    asked.add_argument(
        "--questions",
        type=whole(1),
        metavar="N",
        help=f"of all tasks together (default: {default})",
    )
    asked.add_argument(
        "--prompt",
        default=None,
        help="few-shot, direct or plain (default: few-shot; direct with --data)",
    )
    return asked


def questions_of(options: argparse.Namespace) -> "list[Question]":
    """The questions the options name, those of built-in tasks from `options.split`.

    Raises InputError.
    """
    from ..questions import generate, get_task, load_jsonl

    if bool(options.task) == bool(options.data):
        raise InputError("name questions with either --task or --data")
    if options.data:
        if options.split:
            raise InputError("--split is for built-in tasks; split the files of --data yourself")
        questions = [q for path in options.data for q in load_jsonl(path)]
        if len({q.id for q in questions}) < len(questions):
            raise InputError(
                "two files of --data hold the same question id; make ids unique, or search the "
                "files one by one"
            )
        if options.questions is not None and options.questions > len(questions):
            raise InputError(
                f"--questions {options.questions} but the files hold {len(questions)}; ask for "
                "fewer"
            )
        return questions[: options.questions]
    options.split = options.split or "train"
    tasks = list(dict.fromkeys(options.task))
    for task in tasks:
        get_task(task)
    total = options.questions or 100
    shares = [total // len(tasks) + (i < total % len(tasks)) for i in range(len(tasks))]
    return [
        q
        for task, n in zip(tasks, shares, strict=True)
        if n
        for q in generate(task, n, options.seed, split=options.split)
    ]


def templates_of(name: str, questions: "Sequence[Question]") -> "dict[str, PromptTemplate]":
    from ..questions import get_template

    return {task: get_template(name, task) for task in sorted({q.task for q in questions})}


def check_same_prompts(
    headers: "Sequence[SearchHeader]",
    paths: Sequence[Path],
    templates: "Mapping[str, PromptTemplate]",
) -> None:
    """Raise InputError if a file has records of one of these tasks that were asked in another
    prompt.
    """
    for header, path in zip(headers, paths, strict=True):
        for task, template in templates.items():
            theirs = header.prompt.get(task, template.key)  # imported files name none
            if theirs != template.key:
                name, same = (
                    str(key).partition("@")[0].partition(":")[0] for key in (theirs, template.key)
                )
                remedy = (
                    "search again"
                    if name == same
                    else f"train with --prompt {name}, or search with --prompt {same}"
                )
                raise InputError(
                    f"{path} has records of {task} in the prompt {theirs}, but {template.key} "
                    f"would be trained on, in which other programs are right; {remedy}"
                )


def encode(
    tokenizer: Any, questions: "Sequence[Question]", templates: Any
) -> "list[EncodedQuestion]":
    found: dict[str, EncodedQuestion] = {}
    for task, template in templates.items():
        found |= {
            e.id: e
            for e in template.encode_all(tokenizer, [q for q in questions if q.task == task])
        }
    return [found[q.id] for q in questions]


def row_length(
    encoded: "Sequence[EncodedQuestion]",
    questions: "Sequence[Question]",
    templates: "Mapping[str, PromptTemplate]",
    limit: int | None,
    generated: bool,
) -> int:
    """Tokens the longest of these takes, rounded up so that other questions find regions compiled
    already.

    `limit` is the model's own; `generated`: whether answers are generated, whatever the right one's
    length.
    """

    def length(each: "EncodedQuestion", template: "PromptTemplate") -> int:
        answer = max(map(len, each.targets))
        return (
            len(each.prefix)
            + len(each.prompt)
            + max(answer, template.max_new_tokens if generated else 0)
        )

    needed = max(length(e, templates[q.task]) for q, e in zip(questions, encoded, strict=True))
    rounded = -(-(needed + 1) // _LENGTH_BUCKET) * _LENGTH_BUCKET - 1
    return rounded if limit is None else max(needed, min(rounded, limit))


def file_names(paths: Sequence[Path] | None) -> list[str]:
    return [p.name for p in paths or ()]


def measuring_questions(questions: "Sequence[Question]") -> "list[Question]":
    """Questions whose answers by the identity tell the difficulty of the cells that are
    searched.
    """
    from ..questions import TASKS, cell_sample

    cells = sorted(
        {(q.task, q.cell) for q in questions if q.difficulty is None and q.task in TASKS and q.cell}
    )
    return [
        other for task, cell in cells for other in cell_sample(task, cell, _PER_CELL, split="train")
    ]


def measured_difficulty(
    questions: "Sequence[Question]",
    measuring: "Sequence[Question]",
    encoded: "Sequence[EncodedQuestion]",
    place: "OpenWorkplace",
) -> "list[Question]":
    """The questions, those of measured cells with the level of the identity's accuracy there."""
    from ..program import Program
    from ..questions import levels, with_difficulty

    identity = Program.identity(place.compiled.depth)
    verdicts = place.forcing.evaluate([(e, identity) for e in encoded])
    place.forcing.forget([e.id for e in encoded])
    right: dict[tuple[str, str], list[bool]] = {}
    for question, verdict in zip(measuring, verdicts, strict=True):
        right.setdefault((question.task, question.cell), []).append(verdict.correct)
    made = {}
    for task in {task for task, _ in right}:
        found = levels({cell: (sum(r), len(r)) for (of, cell), r in right.items() if of == task})
        made |= {
            q.id: q
            for q in with_difficulty(
                [q for q in questions if q.task == task and q.cell in found], found
            )
        }
    return [made.get(q.id, q) for q in questions]
