"""From questions to a predictor that was tested: search, train and evaluate in one job.

Each part writes to a folder of its own and goes on where it was interrupted, so the job does.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from ..output.plain_text import duration
from ..search.config import SearchConfig
from ..search.workers import Workplace
from ..training.pipeline import TrainingConfig
from . import evaluate, search, train
from .questions import Asked, own_split

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import Split

Preset = Literal["quick", "full"]
_PROBED = 2  # questions that tell how long all will take
_MOST_PROBES = 4
_ALIKE = 1.5  # a probe that is not faster than the one before it by this compiled nothing
_TASKS = ("addition", "subtraction", "multiplication", "word-problems", "sequences")


@dataclass(frozen=True, kw_only=True)
class FitSize:
    """How much a preset does: `searched` questions with `simulations` programs each, at most
    `train` and `validation` questions and `tested` ones, and a menu as `training` says.
    """

    searched: int
    simulations: int
    train: int
    validation: int
    tested: int
    training: TrainingConfig

    def evaluations(self, there: "Mapping[Split, int]") -> int:
        """Programs on questions, at most, over the whole job; `there` says how many questions there
        are for each split, if they are limited.
        """
        of = {
            "train": min(self.train, there.get("train", self.train)),
            "validation": min(self.validation, there.get("validation", self.validation)),
            "test": min(self.tested, there.get("test", self.tested)),
        }
        config = self.training
        screened = config.num_candidates + config.num_edits + config.num_variations
        return (
            min(self.searched, of["train"]) * (1 + self.simulations)
            + min(config.screen_questions, of["train"]) * screened
            + min(config.final_questions, of["train"]) * config.num_finalists
            + sum(of.values()) * config.menu_size
        )


PRESETS: dict[Preset, FitSize] = {
    "quick": FitSize(
        searched=40,
        simulations=60,
        train=600,
        validation=300,
        tested=400,
        training=TrainingConfig(
            menu_size=8,
            num_candidates=32,
            num_edits=48,
            num_variations=16,
            screen_questions=60,
            num_finalists=16,
            final_questions=120,
        ),
    ),
    "full": FitSize(
        searched=300,
        simulations=200,
        train=2500,
        validation=1200,
        tested=2000,
        training=TrainingConfig(),
    ),
}


@dataclass(frozen=True, kw_only=True)
class FitJob:
    """Settings of the whole way from questions to a tested predictor.

    `asked` names files of data, which are split into train, validation and test questions by what
    their lines say, else by id; or built-in tasks, by default five of them.
    `out` will hold `search.jsonl`, `predictor/` and `report/`. Test questions are looked at in the
    last part alone.
    """

    out: Path
    asked: Asked = field(default_factory=Asked)
    preset: Preset = "quick"
    workplace: Workplace = field(default_factory=Workplace)
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Where the predictor and the report lie, what the evaluation came to, and how long each part
    took, in seconds.
    """

    predictor: Path
    report: Path
    conclusion: str
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "predictor": str(self.predictor),
            "report": str(self.report),
            "conclusion": self.conclusion,
            "seconds": self.seconds,
        }


def run(job: FitJob, console: "Console") -> FitResult:
    """Search, train and evaluate; progress and what is left are shown on `console`.

    Raises InputError, before anything is searched, where a split has too few questions, or after
    the search, where no program answers any, and what the parts raise.
    """
    if job.preset not in PRESETS:
        raise InputError(f"preset {job.preset!r} is none of {', '.join(PRESETS)}")
    size = PRESETS[job.preset]
    asked = job.asked if job.asked.data or job.asked.tasks else replace(job.asked, tasks=_TASKS)
    there = _available(asked)
    seconds: dict[str, float] = {}
    left = size.evaluations(there)
    records = job.out / "search.jsonl"
    to_search = replace(asked, count=min(size.searched, there.get("train", size.searched)))
    if not records.exists():
        rate = _evaluations_per_second(job, asked)
        console.print(
            f"{left:,} programs are run on questions, about {duration(left / rate)} in all; "
            "an interrupted run goes on where it was",
            markup=False,
        )
    began = time.perf_counter()
    found = search.run(_search_job(job, to_search, size=size, out=records), console)
    seconds["search"] = time.perf_counter() - began
    if not any(record.baseline.correct or record.valid for record in found.records()):
        raise InputError(
            f"no program answers any of the {found.questions} questions that were searched: ask "
            "them in another prompt, or others"
        )
    if found.counts.evaluations:
        left -= found.counts.evaluations
        console.print(
            f"about {duration(left / found.evaluations_per_second)} are left", markup=False
        )
    common: dict[str, Any] = {"workplace": job.workplace, "workers": job.workers}
    began, predictor = time.perf_counter(), job.out / "predictor"
    train.run(
        train.TrainJob(
            out=predictor,
            records=(records,),
            asked=replace(asked, count=size.train, split=None),
            validation_count=size.validation,
            config=size.training,
            **common,
        ),
        console,
    )
    seconds["train"] = time.perf_counter() - began
    began, report = time.perf_counter(), job.out / "report"
    tested = evaluate.run(
        evaluate.EvaluateJob(
            predictor=predictor,
            out=report,
            asked=replace(asked, count=size.tested, split=None),
            answers=0,
            baselines=False,
            **common,
        ),
        console,
    )
    seconds["evaluate"] = time.perf_counter() - began
    return FitResult(
        predictor=predictor, report=report, conclusion=tested.conclusion, seconds=seconds
    )


def _available(asked: Asked) -> "dict[Split, int]":
    """How many questions files of data have for each split; empty for tasks, which have any number.

    Raises InputError if they are too few.
    """
    if not asked.data:
        return {}
    found = Counter(map(own_split, replace(asked, count=None, split=None).questions()))
    least_of: dict[Split, int] = {"train": 2, "validation": 2, "test": 1}
    for split, least in least_of.items():
        if found[split] < least:
            raise InputError(
                f"{found[split]} of the questions are for {split}, and at least {least} are "
                'needed: ask more, or name the "split" of each line (train, validation or test)'
            )
    return {split: found[split] for split in least_of}


def _search_job(job: FitJob, asked: Asked, *, size: FitSize, out: Path) -> search.SearchJob:
    """Of train questions."""
    return search.SearchJob(
        asked=replace(asked, split="train"),
        out=out,
        config=SearchConfig(simulations=size.simulations, seed=asked.seed),
        workplace=job.workplace,
        workers=job.workers,
    )


def _evaluations_per_second(job: FitJob, asked: Asked) -> float:
    """Of a short search, whose records are not kept. It is repeated until it compiles no more,
    which one search may leave to the next.
    """
    size, asked = replace(PRESETS[job.preset], simulations=32), replace(asked, count=_PROBED)
    rate = 0.0
    for _ in range(_MOST_PROBES):
        before = rate
        with tempfile.TemporaryDirectory() as folder:
            probed = _search_job(job, asked, size=size, out=Path(folder) / "probe.jsonl")
            rate = search.run(replace(probed, workers=1)).evaluations_per_second
        if rate < _ALIKE * before:
            break
    return rate
