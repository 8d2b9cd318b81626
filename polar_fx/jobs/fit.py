"""From questions to a predictor that was tested: search, train and evaluate in one job.

Each part writes to a folder of its own and goes on where it was interrupted, so the job does.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from ..output.plain_text import duration
from ..search.workers import Workplace
from ..training.pipeline import TrainingConfig
from .questions import Asked, own_split
from .stages import Size, Stages

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import Split

Preset = Literal["quick", "full"]
TASKS = ("addition", "subtraction", "multiplication", "word-problems", "sequences")
"""Built-in tasks that are asked where none is named."""

PRESETS: dict[Preset, Size] = {
    "quick": Size(
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
    "full": Size(
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
    asked = job.asked if job.asked.data or job.asked.tasks else replace(job.asked, tasks=TASKS)
    stages = Stages(
        out=job.out,
        asked=asked,
        size=PRESETS[job.preset].within(available(asked)),
        workplace=job.workplace,
        workers=job.workers,
    )
    left = stages.size.evaluations
    if not stages.records.exists():
        rate = stages.probe().evaluations_per_second
        console.print(
            f"{left:,} programs are run on questions, about {duration(left / rate)} in all; "
            "an interrupted run goes on where it was",
            markup=False,
        )
    found = stages.find_programs(console)
    if found.counts.evaluations:
        left -= found.counts.evaluations
        console.print(
            f"about {duration(left / found.evaluations_per_second)} are left", markup=False
        )
    stages.learn(console)
    tested = stages.test(console)
    return FitResult(
        predictor=stages.predictor,
        report=stages.report,
        conclusion=tested.conclusion,
        seconds=stages.seconds,
    )


def available(asked: Asked) -> "dict[Split, int]":
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
