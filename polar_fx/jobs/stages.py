"""The way from questions to a predictor that was tested, in three stages: search, train, evaluate.

Each writes to a place of its own in one folder and goes on where it was interrupted. Test questions
are looked at in the last one alone.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..search.config import SearchConfig
from ..search.workers import Workplace
from ..training.pipeline import TrainingConfig
from . import evaluate, search, train
from .questions import Asked

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import Split

_MOST_PROBES = 4
_ALIKE = 1.5  # a probe that is not faster than the one before it by this compiled nothing


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done: `searched` questions with `simulations` programs each, at most `train` and
    `validation` questions and `tested` ones, and a menu as `training` says.
    """

    searched: int
    simulations: int
    train: int
    validation: int
    tested: int
    training: TrainingConfig

    def within(self, there: "Mapping[Split, int]") -> "Size":
        """With at most the questions that `there` are for each split; of a split that is not named
        there are any number.
        """
        num_train = min(self.train, there.get("train", self.train))
        return replace(
            self,
            searched=min(self.searched, num_train),
            train=num_train,
            validation=min(self.validation, there.get("validation", self.validation)),
            tested=min(self.tested, there.get("test", self.tested)),
        )

    @property
    def search_evaluations(self) -> int:
        """Programs on questions, at most, in the search."""
        return self.searched * (1 + self.simulations)

    @property
    def menu_evaluations(self) -> int:
        """Programs on questions, at most, to choose the menu."""
        config = self.training
        screened = config.num_candidates + config.num_edits + config.num_variations
        return (
            min(config.screen_questions, self.train) * screened
            + min(config.final_questions, self.train) * config.num_finalists
        )

    @property
    def label_evaluations(self) -> int:
        """Programs of the menu on train and validation questions."""
        return (self.train + self.validation) * self.training.menu_size

    @property
    def test_evaluations(self) -> int:
        """Programs of the menu on test questions."""
        return self.tested * self.training.menu_size

    @property
    def evaluations(self) -> int:
        """Programs on questions, at most, over all stages, without those of baselines."""
        return (
            self.search_evaluations
            + self.menu_evaluations
            + self.label_evaluations
            + self.test_evaluations
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """What a short search told: programs on questions a second, and the seconds that it took before
    the first one, to load and compile the model and to measure how difficult questions are.
    """

    evaluations_per_second: float
    opening: float


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Settings of all three, which `find_programs`, `learn` and `test` run.

    `asked` names built-in tasks or files of data, whose questions are for train, validation or test
    by what their lines say, else by their ids. `out` will hold `search.jsonl`, `predictor/` and
    `report/`. `answers`, `baselines`, `encoder` and `figures` are those of an evaluation.
    `seconds` has what each stage took, as they end, whether well or not.
    """

    out: Path
    asked: Asked
    size: Size
    workplace: Workplace = field(default_factory=Workplace)
    workers: int = 1
    answers: int = 0
    baselines: bool = False
    encoder: str | None = None
    figures: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def records(self) -> Path:
        return self.out / "search.jsonl"

    @property
    def predictor(self) -> Path:
        return self.out / "predictor"

    @property
    def report(self) -> Path:
        return self.out / "report"

    def find_programs(self, console: "Console") -> search.SearchResult:
        """Search train questions. Raises InputError where no program answers any."""
        asked = replace(self.asked, count=self.size.searched)
        with self._timed("search"):
            found = search.run(self._search_job(asked, self.records), console)
        if not any(record.baseline.correct or record.valid for record in found.records()):
            raise InputError(
                f"no program answers any of the {found.questions} questions that were searched: "
                "ask them in another prompt, or others"
            )
        return found

    def learn(self, console: "Console") -> dict[str, Any]:
        """Choose a menu, label and learn; the results of training."""
        job = train.TrainJob(
            out=self.predictor,
            records=(self.records,),
            asked=replace(self.asked, count=self.size.train, split=None),
            validation_count=self.size.validation,
            config=self.size.training,
            workplace=self.workplace,
            workers=self.workers,
        )
        with self._timed("train"):
            return train.run(job, console)

    def test(self, console: "Console") -> evaluate.Evaluation:
        """Ask the test questions."""
        job = evaluate.EvaluateJob(
            predictor=self.predictor,
            out=self.report,
            asked=replace(self.asked, count=self.size.tested, split=None),
            records=(self.records,) if self.baselines else (),
            answers=self.answers,
            baselines=self.baselines,
            encoder=self.encoder,
            figures=self.figures,
            workplace=self.workplace,
            workers=self.workers,
        )
        with self._timed("evaluate"):
            return evaluate.run(job, console)

    def probe(
        self, *, questions: int = 2, simulations: int = 32, evaluator: str = "teacher-forcing"
    ) -> Probe:
        """A short search by one worker, whose records are not kept. It is repeated until it
        compiles no more, which one search may leave to the next.
        """
        size = replace(self.size, simulations=simulations)
        workplace = replace(self.workplace, evaluator=evaluator)
        probe = replace(self, size=size, workplace=workplace, workers=1)
        asked = replace(self.asked, count=questions)
        rate = opening = 0.0
        for _ in range(_MOST_PROBES):
            before, began = rate, time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = search.run(probe._search_job(asked, Path(folder) / "probe.jsonl"))
            rate = found.evaluations_per_second
            opening = time.perf_counter() - began - found.seconds
            if rate < _ALIKE * before:
                break
        return Probe(rate, opening)

    def _search_job(self, asked: Asked, out: Path) -> search.SearchJob:
        """Of train questions."""
        return search.SearchJob(
            asked=replace(asked, split="train"),
            out=out,
            config=SearchConfig(simulations=self.size.simulations, seed=asked.seed),
            workplace=self.workplace,
            workers=self.workers,
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Counts its seconds. A stage sets this process's compute threads to the share of a worker;
        afterwards there are as many as before, or the next one would divide the share again.
        """
        import torch

        began, threads = time.perf_counter(), torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self.seconds[stage] = time.perf_counter() - began
