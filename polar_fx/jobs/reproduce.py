"""From nothing to tables for a model, within a budget of hours: a plan is made of a short
measurement, then programs are searched, a menu is chosen, a selector learns, and test questions are
asked once, beside baselines.

An interrupted run goes on with its plan.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from ..environment import has_matplotlib
from ..errors import InputError, TrainingError
from ..output.files import made_folder, write_whole
from ..search.records.record_file import RecordReader
from ..search.workers import Workplace
from .fit import PRESETS, TASKS
from .labeller import named_model
from .progress import silent_console
from .questions import Asked, measuring_questions
from .reproduction_plan import Measured, Plan, Protocol
from .reproduction_report import Reproduced, write_tables
from .stages import Stages
from .tiers import TierQuestions, read_tiers

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import Split

PLAN, QUESTIONS, TOOK = "plan.json", "questions.jsonl", "seconds.json"
_CELLS = 400  # questions of built-in tasks that meet all of their cells
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ReproduceJob:
    """Settings of a reproduction of `budget` hours, whose files lie in `out`.

    The protocol "tasks" asks built-in tasks in few-shot prompts. "paper" asks files of `data`,
    whose lines name tiers of difficulty, for the answer alone in a box, and compares tiers; train
    questions whose ids are lines of `leave_out` are left out. `encoder` is a text encoder's folder
    or id, for PoLar's network as the paper has it.
    """

    out: Path
    budget: float = 6.0
    protocol: Protocol = "tasks"
    data: tuple[Path, ...] = ()
    leave_out: Path | None = None
    encoder: str | None = None
    seed: int = 0
    workplace: Workplace = field(default_factory=Workplace)
    workers: int = 1

    def check(self) -> None:
        """Raise InputError for settings that do not go together, before anything is loaded."""
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise InputError(f"a budget of {self.budget:g} hours; give a number of hours above 0")
        if self.protocol not in get_args(Protocol):
            known = ", ".join(get_args(Protocol))
            raise InputError(f"protocol {self.protocol!r} is none of {known}")
        if self.protocol == "paper" and not self.data:
            raise InputError(
                "the paper's protocol has no questions of its own; name files of data whose lines "
                "have a tier"
            )
        if self.protocol == "tasks" and (self.data or self.leave_out):
            raise InputError(
                "data, and ids to leave out of it, are for the protocol 'paper'; name that, or "
                "leave them out"
            )
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is no folder; name one, or one that is not there yet")

    def settings(self, questions: TierQuestions | None) -> dict[str, Any]:
        """What a run that goes on must share, as JSON values."""
        from ..questions.question import digest_of

        place = self.workplace
        return {
            "protocol": self.protocol,
            "budget": self.budget,
            "model": named_model(place)["model_name"],
            "dtype": place.dtype,
            "quantize": place.quantize,
            "device": place.device,
            "backend": place.backend,
            "encoder": self.encoder,
            "seed": self.seed,
            "data": [path.name for path in self.data],
            "questions": list(TASKS) if questions is None else digest_of(questions.questions),
            "left out": 0 if questions is None else questions.left_out,
        }


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What a reproduction came to, the plan it followed, the seconds that its stages took, and the
    files with its tables.
    """

    conclusion: str
    plan: Plan
    seconds: dict[str, float]
    files: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "conclusion": self.conclusion,
            "plan": self.plan.to_dict(),
            "seconds": self.seconds,
            "files": [str(path) for path in self.files],
        }


def plan(job: ReproduceJob, console: "Console | None" = None) -> Plan:
    """The plan that is kept in `job.out`, or else one that is made there of a short measurement.

    Raises InputError for settings that do not fit, differ from those of the plan that is kept, or
    whose budget is too small, and what `polar_fx.load` and `polar_fx.compile` raise.
    """
    return _prepared(job, console or silent_console())[0]


def run(job: ReproduceJob, console: "Console | None" = None) -> Reproduction:
    """Plan, search, train, evaluate, and write `tables.md` and `results.json` to `job.out`.

    Baselines that have nothing to learn from are left out of the tables, with the reason; so is the
    whole test where no predictor can be trained. Raises what `plan` and the stages raise.
    """
    console = console or silent_console()
    made, stages, questions = _prepared(job, console)
    for line in made.lines():
        console.print(line, markup=False, soft_wrap=True)
    took = _Took(job.out / TOOK)
    took.stage("search", stages.find_programs, stages=stages, console=console)
    trained: dict[str, Any] = {}
    without, report, concluded = "", None, ""
    try:
        trained = took.stage("train", stages.learn, stages=stages, console=console)
    except TrainingError as error:
        # what the search found is told all the same
        concluded = f"no predictor could be trained, and nothing was tested: {error}"
        console.print(concluded, markup=False)
    else:
        if without := _why_no_baselines(stages):
            console.print(without, markup=False)
            stages = _stages(job, made, baselines=False)
        tested = took.stage("evaluate", stages.test, stages=stages, console=console)
        report, concluded = stages.report, tested.conclusion
    files = write_tables(
        job.out,
        Reproduced(
            plan=made,
            seconds=took.seconds,
            trained=trained,
            conclusion=concluded,
            records=stages.records,
            report=report,
            questions=None if questions is None else questions.facts(),
            without_baselines=without,
            figures=stages.figures,
        ),
    )
    return Reproduction(conclusion=concluded, plan=made, seconds=took.seconds, files=files)


def _prepared(job: ReproduceJob, console: "Console") -> tuple[Plan, Stages, TierQuestions | None]:
    """The plan, kept or made, the stages that follow it, and the questions of files."""
    job.check()
    questions = None
    if job.protocol == "paper":
        questions = read_tiers(job.data, job.leave_out, seed=job.seed)
    settings, path = job.settings(questions), job.out / PLAN
    if path.exists():
        made = Plan.read(path, settings)
        console.print(f"going on with the plan in {path}", style="dim", markup=False)
    elif (job.out / "search.jsonl").exists():
        raise InputError(
            f"{job.out} holds search.jsonl but no {PLAN}, so it is no reproduction; name another "
            "folder"
        )
    else:
        measured = _measure(job, questions, console=console)
        there: dict[Split, int] = {} if questions is None else questions.there
        made = Plan.fitting(settings, measured, there=there)
        made_folder(job.out)
        made.write(path)
        _Took(job.out / TOOK).add("measure", measured.seconds)
    if questions is not None:
        questions.write(job.out / QUESTIONS)
    return made, _stages(job, made, baselines=True), questions


def _asked(job: ReproduceJob, folder: Path) -> Asked:
    """Built-in tasks, or the file of questions in the folder."""
    if job.protocol == "paper":
        return Asked(data=(folder / QUESTIONS,), prompt="direct", seed=job.seed)
    return Asked(tasks=TASKS, seed=job.seed)


def _stages(job: ReproduceJob, made: Plan, *, baselines: bool) -> Stages:
    return Stages(
        out=job.out,
        asked=_asked(job, job.out),
        size=made.size,
        workplace=job.workplace,
        workers=job.workers,
        answers=made.answers,
        baselines=baselines,
        encoder=job.encoder if baselines else None,
        figures=has_matplotlib(),
    )


def _measure(job: ReproduceJob, questions: TierQuestions | None, *, console: "Console") -> Measured:
    """Searches of a few train questions, by verdicts and, for the paper's protocol, by generated
    answers. Nothing is kept.
    """
    began = time.perf_counter()
    answering = None
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status("measuring how long this machine takes ..."),
    ):
        asked = _asked(job, Path(folder))
        stages = Stages(
            out=Path(folder), asked=asked, size=PRESETS["quick"], workplace=job.workplace
        )
        if questions is not None:
            questions.write(Path(folder) / QUESTIONS)
        verdicts = stages.probe(questions=5, simulations=12)
        if questions is not None:
            answering = stages.probe(questions=2, simulations=3, evaluator="generation")
    identities = 0
    if questions is None:
        asked = replace(asked, count=_CELLS, split="train")
        identities = len(measuring_questions(asked.questions()))
    return Measured(
        verdicts=verdicts,
        answering=answering,
        seconds=time.perf_counter() - began,
        identities=identities,
    )


def _why_no_baselines(stages: Stages) -> str:
    """Empty where the baselines have something to learn from."""
    parts = stages.predictor / "parts"
    for split in ("train", "validation"):
        if not any(r.identity_correct for r in RecordReader(parts / f"{split}.jsonl")):
            return (
                f"the model as it is answers none of the {split} questions, so the baselines have "
                "nothing to learn from and are left out"
            )
    return ""


class _Took:
    """Seconds of each stage, over all runs, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            try:
                kept = dict(json.loads(path.read_text(encoding="utf-8")))
                self.seconds = {str(stage): float(number) for stage, number in kept.items()}
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{path} cannot be read: {error}; remove it") from error

    def add(self, stage: str, seconds: float) -> None:
        """Count more seconds. Raises InputError."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        write_whole(json.dumps(self.seconds, indent=1).encode() + b"\n", self._path)

    def stage(
        self, name: str, run: "Callable[[Console], T]", *, stages: Stages, console: "Console"
    ) -> T:
        """Run it, and count what it took even where it was interrupted."""
        try:
            return run(console)
        finally:
            self.add(name, stages.seconds.get(name, 0.0))
