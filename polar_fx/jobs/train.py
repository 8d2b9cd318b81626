"""Training a predictor from search records: mine a menu, label it densely, fit and calibrate."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..output.files import replace_file
from ..predictor.policy import Policy
from ..predictor.saved import save_selector
from ..program import Program
from ..questions import TASKS, Question
from ..search.analysis.menu_coverage import key
from ..search.records.record_file import RecordReader
from ..search.workers import Workplace
from ..training.pipeline import (
    MINED,
    TrainingConfig,
    folder_of,
    too_few_to_certify,
    train_predictor,
)
from .labeller import Labeller
from .progress import silent_console
from .questions import Asked, check_same_prompts, own_split, prompt_keys

if TYPE_CHECKING:
    from rich.console import Console

    from ..predictor.selector import Selector
    from ..questions import Template
    from ..search.records.records import SearchHeader, SearchRecord
    from ..training.verdict_table import Rows

_TRAIN_QUESTIONS = 1500


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Settings of a training run.

    `records` are files of searches of one model, `out` is the predictor's folder. With `programs`,
    texts of programs, the menu is these and nothing is mined: records are not needed. `asked` says
    what is trained on (with neither tasks nor files: the tasks of the records; `count` None: 1500
    questions of tasks, all train questions of files); its `split` is not looked at. Validation has
    `validation_count` questions (None: a quarter of those; of files all). `policy` is saved with
    the predictor. `workers` processes label. Losses are written to the folder `tensorboard`.
    """

    out: Path
    records: tuple[Path, ...] = ()
    programs: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    validation_count: int | None = None
    config: TrainingConfig = field(default_factory=TrainingConfig)
    policy: str = "accuracy"
    workplace: Workplace = field(default_factory=Workplace)
    workers: int = 1
    tensorboard: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Those of a training run; test questions are never among them."""

    train: list[Question]
    validation: list[Question]

    @property
    def all(self) -> list[Question]:
        return [*self.train, *self.validation]


def run(job: TrainJob, console: "Console | None" = None) -> dict[str, Any]:
    """Train; writes the predictor and `results.json` to `job.out`, returns the results.

    Verdicts are kept in `job.out`, and an interrupted run of the same settings is gone on with.
    Raises InputError for settings and records that do not fit, RecordFileError, and what
    `polar_fx.load` and `polar_fx.compile` raise.
    """
    began = time.perf_counter()
    console = console or silent_console()
    if not (job.records or job.programs):
        raise InputError("there is no menu; name files of search records to mine one, or programs")
    readers = [RecordReader(path) for path in job.records]
    headers = [reader.header for reader in readers]
    _check_same_model(headers, job.records)
    records = [record for reader in readers for record in reader]
    asked = _with_tasks(job.asked, headers)
    questions = _questions(asked, job.validation_count)
    if few := too_few_to_certify([q.task for q in questions.validation], job.config):
        console.print(few, markup=False)
    templates = asked.templates(questions.all)
    check_same_prompts(headers, job.records, templates=templates)
    labeller = Labeller(
        job.workplace, templates, questions=questions.all, workers=job.workers, console=console
    )
    for header in headers[:1]:
        labeller.check_model(header)
    policy = Policy.parse(job.policy, labeller.depth)
    usable = _without(records, questions.validation)
    if left := len(records) - len(usable):
        console.print(f"{left} records are of validation questions and not used", style="dim")
    selector, measured = _train(job, labeller, questions=questions, records=usable)
    policy.check(selector.calibration, {selector.menu.programs[0]: 0.0})
    train_ids = {(question.task, question.id) for question in questions.train}
    results = {
        **measured,
        "too_few_to_certify": few,
        "records": [path.name for path in job.records],
        "train_ids": len(train_ids),
        "model": labeller.model_fingerprint,
        "prompts": prompt_keys(templates),
        "seconds": time.perf_counter() - began,
        "dtype": labeller.workplace.weights,
        "ok": True,
    }
    mined = json.dumps(sorted({record.question.id for record in usable}))
    replace_file(folder_of(job.out) / MINED, [mined.encode()])
    notes = _notes(job, asked.prompt_name(questions.all), templates=templates)
    notes |= labeller.model_names()
    save_selector(selector, job.out, model=labeller.model_fingerprint, policy=policy, notes=notes)
    text = json.dumps(results, indent=1, default=str)
    replace_file(job.out / "results.json", [text.encode() + b"\n"])
    return results


def _check_same_model(headers: "Sequence[SearchHeader]", paths: Sequence[Path]) -> None:
    for header, path in zip(headers[1:], paths[1:], strict=True):
        if header.model != headers[0].model:
            raise InputError(
                f"{path} is of another model than {paths[0]}; train on records of one model and "
                "dtype"
            )


def _with_tasks(asked: Asked, headers: "Sequence[SearchHeader]") -> Asked:
    """The tasks of the first records, if no questions are named."""
    if asked.tasks or asked.data:
        return asked
    named = headers[0].task.get("tasks", ()) if headers else ()
    tasks = tuple(task for task in named if task in TASKS)
    if not tasks:
        raise InputError(
            "the records are of no built-in task; name questions by tasks or files of data"
        )
    return replace(asked, tasks=tasks)


def _questions(asked: Asked, validation_count: int | None) -> Questions:
    """Train and validation questions; of files by the split they name, else by their id."""
    if asked.data:
        every = replace(asked, count=None, split=None).questions()
        train = [q for q in every if own_split(q) == "train"]
        validation = [q for q in every if own_split(q) == "validation"]
        return Questions(train=train[: asked.count], validation=validation[:validation_count])
    count = asked.count or _TRAIN_QUESTIONS
    held_out = validation_count or max(1, count // 4)
    return Questions(
        train=replace(asked, count=count, split="train").questions(),
        validation=replace(asked, count=held_out, split="validation").questions(),
    )


def _without(
    records: "Sequence[SearchRecord]", held_out: Sequence[Question]
) -> "list[SearchRecord]":
    names = {(q.task, q.id) for q in held_out}
    return [record for record in records if key(record) not in names]


def _train(
    job: TrainJob, labeller: Labeller, *, questions: Questions, records: "Sequence[SearchRecord]"
) -> "tuple[Selector, dict[str, Any]]":
    """The selector, and what was measured on the way."""
    parts = folder_of(job.out)

    def with_tokens(questions: Sequence[Question]) -> "Rows":
        return [(question, labeller.encoded[question.id]) for question in questions]

    writer = _LossWriter(job.tensorboard) if job.tensorboard is not None else None
    try:
        return train_predictor(
            records,
            with_tokens(questions.train),
            validation=with_tokens(questions.validation),
            dense=lambda name, rows, programs: labeller.table(
                parts / f"{name}.jsonl", rows, programs=programs
            ),
            features_of=lambda rows: labeller.features(rows, job.config.features),
            depth=labeller.depth,
            config=job.config,
            programs=[Program.parse(text, labeller.depth) for text in job.programs],
            progress=writer,
            runs=labeller.compiled.library.runs,
        )
    finally:
        if writer is not None:
            writer.close()


def _notes(job: TrainJob, prompt: str, *, templates: "Mapping[str, Template]") -> dict[str, Any]:
    """What is saved with the predictor, for those who evaluate or run it."""
    return {
        "tasks": sorted(templates),
        "prompt": prompt,
        "prompts": prompt_keys(templates),
        "config": asdict(job.config),
    }


class _LossWriter:
    """Writes the losses of each epoch for TensorBoard.

    Raises InputError if that is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"losses in {folder} need tensorboard, which is not installed; pip install "
                "tensorboard"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))
        self.close: Callable[[], None] = self._writer.close

    def __call__(self, epoch: int, losses: Mapping[str, float]) -> None:
        for side, loss in losses.items():
            self._writer.add_scalar(f"loss/{side}", loss, epoch)
