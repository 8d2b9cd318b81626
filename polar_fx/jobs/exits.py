"""Learning early exits of questions with choices, and testing them once on others.

Scores are kept in a file, and an interrupted job goes on from there.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..judge.choosing import choice_scores, first_layers
from ..judge.early_exit import ChoiceScores, EarlyExit, EarlyExits
from ..output.digest import digest
from ..output.files import made_folder, replace_file
from ..questions.choices import best_choice
from ..search.workers import Workplace
from ..stats.arms import IDENTITY, ArmResult, compare_arms
from ..stats.tables import write_compared
from ..training.exit_learning import DELTA, check_settings, learn_exit
from .labeller import named_model
from .opening import open_job
from .progress import progress_bar, silent_console
from .questions import Asked, own_split

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import EncodedQuestion, Question
    from ..stats.arms import ArmComparison
    from .opening import OpenJob

ARM = "early exit"
RULES = "early_exits.json"
# of the layers; every model tries exits after so many
_PARTS = (0.07, 0.13, 0.2, 0.27, 0.4, 0.53, 0.67, 0.8)
_PART = 32  # questions scored at a time


@dataclass(frozen=True, kw_only=True)
class ExitsJob:
    """Settings: questions with choices (`asked.data`), whose test ones are apart by what their
    lines say, else by their ids; mean steps of `budget` x depth, if at most a share `risk` of all
    choices changes by that and at most a share `loss` of right answers is lost (less those gained,
    of all questions), with probability 1 - `delta`; and where results go.
    """

    out: Path
    asked: Asked
    budget: float = 0.9
    risk: float = 0.05
    loss: float = 0.03
    delta: float = DELTA
    workplace: Workplace = field(default_factory=Workplace)


@dataclass(frozen=True, kw_only=True)
class ExitsResult:
    """The exits, where they were written, and how they compare with the whole model on test
    questions.
    """

    exits: EarlyExits
    path: Path
    compared: list["ArmComparison"]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [
            {"arm": row.label, "task": row.arm.task, **row.paired.to_dict()}
            for row in self.compared
        ]
        tasks = {name: each.to_dict() for name, each in self.exits.tasks.items()}
        return {"path": str(self.path), "exits": tasks, "arms": rows, "seconds": self.seconds}


def run(job: ExitsJob, console: "Console | None" = None) -> ExitsResult:
    """Score, learn on train and validation questions, whose answers only bound the loss, test.

    Raises InputError for questions without choices, too few of a task, or a budget that cannot be
    kept, and what `polar_fx.load` and `polar_fx.compile` raise.
    """
    began = time.perf_counter()
    console = console or silent_console()
    questions = job.asked.questions()
    if without := next((q for q in questions if not q.choices), None):
        raise InputError(
            f"question {without.id!r} has no choices; early exits compare the scores of choices, "
            "so name questions that have them"
        )
    for task, count in _learning_questions(questions).items():
        with _about(task):
            check_settings(count, budget=job.budget, risk=job.risk, loss=job.loss, delta=job.delta)
    opened = open_job(
        job.workplace, questions, templates=job.asked.templates(questions), console=console
    )
    table = _Scores(job, opened, questions=questions)
    learning = [q for q in questions if own_split(q) != "test"]
    table.fill([(q, table.num_steps) for q in learning], console)
    exits = _learned(job, opened, table=table, questions=learning)
    path = exits.save(made_folder(job.out) / RULES)
    asked = [q for q in questions if own_split(q) == "test"]
    table.fill([(q, _steps_of(exits.tasks[q.task], table.depth)) for q in asked], console)
    arms = [arm for task in exits.tasks for arm in _tested(task, exits, table=table, asked=asked)]
    result = ExitsResult(
        exits=exits,
        path=path,
        compared=compare_arms(arms) if arms else [],
        seconds=time.perf_counter() - began,
    )
    replace_file(job.out / "results.json", [json.dumps(result.to_dict(), indent=1).encode()])
    if arms:
        write_compared(result.compared, job.out)
    return result


def _steps_of(rule: EarlyExit, depth: int) -> tuple[int, ...]:
    """After how many layers a test question is scored."""
    return (depth,) if rule.never else (rule.num_steps, depth)


@contextmanager
def _about(task: str) -> Iterator[None]:
    """What is wrong inside is told of this task."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task {task!r}: {error}") from error


def _learning_questions(questions: "Sequence[Question]") -> dict[str, int]:
    """How many of each task are not for the test."""
    found = dict.fromkeys((q.task for q in questions), 0)
    for question in questions:
        found[question.task] += own_split(question) != "test"
    return found


class _Scores:
    """Scores of questions after some numbers of layers, kept in a file as they are made."""

    def __init__(
        self, job: ExitsJob, opened: "OpenJob", *, questions: "Sequence[Question]"
    ) -> None:
        self.forcing, self.depth = opened.place.forcing, opened.place.compiled.depth
        self.encoded = {encoded.id: encoded for encoded in opened.encoded}
        tried = {max(1, round(part * self.depth)) for part in _PARTS} - {self.depth}
        self.num_steps = (*sorted(tried), self.depth)
        facts = {
            "weights": opened.place.compiled.library.weights_fingerprint,
            "prompt": job.asked.prompt_name(questions),
        }
        self.path = made_folder(job.out) / f"scores-{digest(facts)[:12]}.jsonl"
        self.known: dict[tuple[str, int], ChoiceScores] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            row = _row(line)
            encoded = None if row is None else self.encoded.get(row["id"])
            if row is not None and encoded is not None and row["asked"] == _asked(encoded):
                self._take(encoded, row["scores"])
        if text and not text.endswith("\n"):  # of a job that was killed
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def fill(self, wanted: "Sequence[tuple[Question, Sequence[int]]]", console: "Console") -> None:
        """Score what is not in the file yet, of each question after so many layers."""
        left: dict[tuple[int, ...], list[EncodedQuestion]] = {}
        for question, num_steps in wanted:
            missing = tuple(n for n in num_steps if (question.id, n) not in self.known)
            if missing:
                left.setdefault(missing, []).append(self.encoded[question.id])
        with (
            self.path.open("a", encoding="utf-8") as file,
            progress_bar(console, "questions") as bar,
        ):
            line = bar.add_task("", total=len(wanted))
            bar.advance(line, len(wanted) - sum(map(len, left.values())))
            for num_steps, encoded in left.items():
                for start in range(0, len(encoded), _PART):
                    part = encoded[start : start + _PART]
                    for each, scores in zip(part, self._scored(part, num_steps), strict=True):
                        row = {"id": each.id, "asked": _asked(each), "scores": scores}
                        file.write(json.dumps(row, allow_nan=False) + "\n")
                        self._take(each, scores)
                    file.flush()
                    bar.advance(line, len(part))

    def of(self, asked: "Sequence[Question]", num_steps: int) -> list[ChoiceScores]:
        """Of these questions after so many layers."""
        return [self.known[question.id, num_steps] for question in asked]

    def right(self, asked: "Sequence[Question]") -> list[int]:
        """The places of their right choices."""
        keys = [self.encoded[question.id].choice for question in asked]
        return [key.right for key in keys if key is not None]

    def _scored(
        self, part: "Sequence[EncodedQuestion]", num_steps: Sequence[int]
    ) -> list[dict[str, list[float | None]]]:
        """Of each question the scores after each number of layers, as JSON has them."""
        found: list[dict[str, list[float | None]]] = [{} for _ in part]
        for steps in num_steps:
            program = first_layers(steps, self.depth)
            scored = choice_scores(self.forcing, part, program=program)
            for row, each in zip(found, scored, strict=True):
                row[str(steps)] = _to_json(each.scores)
        self.forcing.forget([encoded.id for encoded in part])
        return found

    def _take(
        self, encoded: "EncodedQuestion", scores: Mapping[str, Sequence[float | None]]
    ) -> None:
        assert encoded.choice is not None
        for steps, each in scores.items():
            found = ChoiceScores.of(_from_json(each), encoded.choice)
            self.known[encoded.id, int(steps)] = found


def _to_json(scores: Sequence[float]) -> list[float | None]:
    """Of one program; a choice that cannot be is None, as JSON has no infinity."""
    return [score if math.isfinite(score) else None for score in scores]


def _from_json(scores: Sequence[float | None]) -> list[float]:
    return [-math.inf if score is None else score for score in scores]


def _asked(encoded: "EncodedQuestion") -> str:
    """What tells these tokens from those of another question of the same id."""
    return digest({"prompt": encoded.prompt, "targets": encoded.targets})[:16]


def _row(line: str) -> dict[str, Any] | None:
    """A line of the file; None for the last one of a job that was killed while it wrote it."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _learned(
    job: ExitsJob, opened: "OpenJob", *, table: _Scores, questions: "Sequence[Question]"
) -> EarlyExits:
    """An exit of each task of these questions."""
    tasks: dict[str, EarlyExit] = {}
    for task in dict.fromkeys(q.task for q in questions):
        asked = [q for q in questions if q.task == task]
        candidates = {steps: table.of(asked, steps) for steps in table.num_steps[:-1]}
        with _about(task):
            tasks[task] = learn_exit(
                candidates,
                table.of(asked, table.depth),
                depth=table.depth,
                budget=job.budget,
                risk=job.risk,
                loss=job.loss,
                delta=job.delta,
                right=table.right(asked),
            )
    notes = {
        **named_model(job.workplace),
        "budget": job.budget,
        "risk": job.risk,
        "loss": job.loss,
        "delta": job.delta,
        "learned_from": len(questions),
    }
    weights = opened.place.compiled.library.weights_fingerprint
    return EarlyExits(tasks, weights, job.asked.prompt_name(questions), notes)


def _tested(
    task: str, exits: EarlyExits, *, table: _Scores, asked: "Sequence[Question]"
) -> list[ArmResult]:
    """The whole model and the exit on the test questions of a task; nothing if there are none."""
    of_task = [q for q in asked if q.task == task]
    if not of_task:
        return []
    rule, depth = exits.tasks[task], table.depth
    whole, key = table.of(of_task, depth), np.array(table.right(of_task))
    own = np.array([each.best for each in whole])
    told = [None] * len(own)
    if not rule.never:
        told = rule.answers(table.of(of_task, rule.num_steps))
    leaves = np.array([each is not None for each in told])
    both = zip(own.tolist(), told, strict=True)
    taken = np.array([stays if each is None else best_choice(each) for stays, each in both])
    all_steps = np.full(len(own), float(depth))
    steps = np.where(leaves, float(rule.num_steps), all_steps)
    return [
        ArmResult(IDENTITY, task, own == key, own == key, all_steps, all_steps),
        ArmResult(ARM, task, taken == key, own == key, steps, all_steps),
    ]
