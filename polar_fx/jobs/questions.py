"""Questions of a job: which are asked, how, how long they are, and how difficult."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..questions import EncodedQuestion, Question, Split, Template
    from ..search.records.records import SearchHeader
    from ..search.workers import OpenWorkplace

_LENGTH_BUCKET = 64
PER_CELL = 60
"""Questions of the train split that measure a cell's difficulty."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions of built-in `tasks`, or of `data`, which are files of JSON lines; in which prompt.

    `count` is the number of questions of all tasks together (None: 100), or of all files (None: all
    of them). `split` is of built-in tasks (None: train); of files it leaves the questions that
    their lines, or else their ids, give to it (None: all of them). `seed` is of built-in tasks.
    `prompt` names a built-in one (None: few-shot for tasks, direct for files).
    """

    tasks: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    count: int | None = None
    prompt: str | None = None
    split: "Split | None" = None
    seed: int = 0

    def prompt_name(self, questions: "Sequence[Question]") -> str:
        """Of the built-in prompt that these questions are asked in."""
        written = "direct" if self.data else "few-shot"
        return self.prompt or ("choices" if any(q.choices for q in questions) else written)

    @property
    def split_name(self) -> "Split | None":
        """The split that is asked; None for all of files."""
        return self.split if self.data else self.split or "train"

    def questions(self) -> "list[Question]":
        """Those that are meant. Raises InputError, also for a file that cannot be read."""
        if bool(self.tasks) == bool(self.data):
            raise InputError("name questions by either tasks or files of data")
        return self._of_files() if self.data else self._of_tasks()

    def templates(self, questions: "Sequence[Question]") -> "dict[str, Template]":
        """The prompt of each task of these questions. Raises InputError if it has none."""
        return templates_of(self.prompt_name(questions), questions)

    def _of_files(self) -> "list[Question]":
        from ..questions import load_jsonl

        questions = [q for path in self.data for q in load_jsonl(path)]
        if len({q.id for q in questions}) < len(questions):
            raise InputError(
                "two files of data hold the same question id; make ids unique, or search the "
                "files one by one"
            )
        if self.split is not None:
            questions = [q for q in questions if own_split(q) == self.split]
        if self.count is not None and self.count > len(questions):
            of_split = "" if self.split is None else f" for {self.split}"
            raise InputError(
                f"{self.count} questions are asked but the files of data hold "
                f"{len(questions)}{of_split}; ask for fewer"
            )
        return questions[: self.count]

    def _of_tasks(self) -> "list[Question]":
        from ..questions import generate, get_task

        tasks = list(dict.fromkeys(self.tasks))
        for task in tasks:
            get_task(task)
        share, more = divmod(self.count or 100, len(tasks))
        questions: list[Question] = []
        for place, task in enumerate(tasks):
            if number := share + (place < more):
                questions += generate(task, number, self.seed, split=self.split or "train")
        return questions


def own_split(question: "Question") -> "Split":
    """The split that a question's line names, or else its id."""
    from ..questions import split_of

    return question.split or split_of(question.id)


def templates_of(name: str, questions: "Sequence[Question]") -> "dict[str, Template]":
    """The built-in prompt `name` of each task of these questions, by task. Raises InputError."""
    from ..questions import any_template

    tasks = sorted({question.task for question in questions})
    return {task: any_template(name, task) for task in tasks}


def prompt_keys(templates: "Mapping[str, Template]") -> dict[str, str]:
    """What tells the prompt of each task from others, as files of results state it."""
    return {task: template.key for task, template in templates.items()}


def check_same_prompts(
    headers: "Sequence[SearchHeader]",
    paths: Sequence[Path],
    *,
    templates: "Mapping[str, Template]",
) -> None:
    """Raise InputError if a file has records of one of these tasks that were asked in another
    prompt.
    """
    for header, path in zip(headers, paths, strict=True):
        for task, template in templates.items():
            theirs = str(header.prompt.get(task, template.key))  # imported files name none
            if theirs != template.key:
                raise InputError(
                    f"{path} has records of {task} in the prompt {theirs}, but {template.key} "
                    "would be trained on, in which other programs are right; "
                    + _prompt_remedy(theirs, template.key)
                )


def _prompt_remedy(theirs: str, ours: str) -> str:
    """Keys are `name@version`, or `name:task@version`."""
    searched, trained = (key.partition("@")[0].partition(":")[0] for key in (theirs, ours))
    if searched == trained:
        return "search again"
    return f"train with the prompt {searched}, or search with the prompt {trained}"


def encode(
    tokenizer: Any,
    questions: "Sequence[Question]",
    *,
    templates: "Mapping[str, Template]",
) -> "list[EncodedQuestion]":
    """The questions as tokens, each in its task's prompt, in the same order."""
    found: dict[str, EncodedQuestion] = {}
    for task, template in templates.items():
        of_task = [q for q in questions if q.task == task]
        found |= {e.id: e for e in template.encode_all(tokenizer, of_task)}
    return [found[q.id] for q in questions]


def row_tokens(
    encoded: "Sequence[EncodedQuestion]",
    questions: "Sequence[Question]",
    *,
    templates: "Mapping[str, Template]",
    limit: int | None,
    generated: bool,
) -> int:
    """Tokens the longest of these takes, rounded up so that other questions find regions compiled
    already.

    `limit` is the model's own; `generated`: whether answers are generated, whatever the right one's
    length.
    """

    def tokens(each: "EncodedQuestion", template: "Template") -> int:
        answer = max(map(len, each.targets))
        room = max(answer, template.max_new_tokens) if generated else answer
        return len(each.prefix) + len(each.prompt) + room

    needed = max(tokens(e, templates[q.task]) for q, e in zip(questions, encoded, strict=True))
    rounded = -(-(needed + 1) // _LENGTH_BUCKET) * _LENGTH_BUCKET - 1
    return rounded if limit is None else max(needed, min(rounded, limit))


def measuring_questions(questions: "Sequence[Question]") -> "list[Question]":
    """Questions of the train split whose answers by the identity tell how difficult the cells of
    `questions` are; of built-in tasks, where no difficulty is given.
    """
    from ..questions import TASKS, cell_sample

    unknown = [q for q in questions if q.difficulty is None and q.task in TASKS and q.cell]
    measuring: list[Question] = []
    for task, cell in sorted({(q.task, q.cell) for q in unknown}):
        measuring += cell_sample(task, cell, n=PER_CELL, split="train")
    return measuring


def measured_difficulty(
    questions: "Sequence[Question]",
    measuring: "Sequence[Question]",
    *,
    encoded: "Sequence[EncodedQuestion]",
    place: "OpenWorkplace",
) -> "list[Question]":
    """The questions, those of measured cells with the level of the identity's accuracy there.

    `encoded` are the `measuring` questions as tokens.
    """
    from ..program import Program
    from ..questions import levels, with_difficulty

    identity = Program.identity(place.compiled.depth)
    verdicts = place.forcing.evaluate([(e, identity) for e in encoded])
    place.forcing.forget([e.id for e in encoded])
    right: dict[str, dict[str, list[bool]]] = {}
    for question, verdict in zip(measuring, verdicts, strict=True):
        right.setdefault(question.task, {}).setdefault(question.cell, []).append(verdict.correct)
    made: dict[str, Question] = {}
    for task, cells in right.items():
        found = levels({cell: (sum(flags), len(flags)) for cell, flags in cells.items()})
        of_cells = [q for q in questions if q.task == task and q.cell in found]
        made |= {q.id: q for q in with_difficulty(of_cells, found)}
    return [made.get(q.id, q) for q in questions]
