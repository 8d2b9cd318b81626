"""Searching programs for questions, every explored program kept."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..search.config import SearchConfig
from ..search.workers import Row, Workplace
from .opening import OpenJob, open_job
from .progress import progress_bar, silent_console
from .questions import Asked, prompt_keys

if TYPE_CHECKING:
    from rich.console import Console

    from ..questions import Question, Template
    from ..search.records.record_file import RecordReader, RecordStore
    from ..search.records.records import SearchHeader, SearchRecord


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """Settings of a search.

    `out` is the file of records; with `restart` one that is there is begun anew and kept beside it
    as `.old`, otherwise gone on with. `workplace` says what judges; its `max_length` and
    `templates` are filled in. With `workers` more than one, or `ray`, the address of a cluster (an
    empty text: one on this machine), other processes search.
    """

    asked: Asked
    out: Path
    config: SearchConfig = field(default_factory=SearchConfig)
    workplace: Workplace = field(default_factory=Workplace)
    workers: int = 1
    ray: str | None = None
    restart: bool = False


@dataclass(kw_only=True)
class Counts:
    """What a search found, over the questions it searched.

    `evaluations` counts programs on questions, `right` the questions that the identity answers,
    `corrected` those that another program answers instead, `shorter` those that a program of fewer
    steps answers.
    """

    evaluations: int = 0
    right: int = 0
    corrected: int = 0
    shorter: int = 0

    def add(self, record: "SearchRecord") -> None:
        """Count one more question."""
        self.evaluations += len(record.explored) + 1
        self.right += record.baseline.correct
        self.corrected += record.is_rescued
        self.shorter += any(p.num_steps < record.depth for p in record.valid)

    def __str__(self) -> str:
        return f"{self.right} right, {self.corrected} corrected, {self.shorter} shorter"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """How a search went: of `questions`, `searched` had no record before, and took `seconds`."""

    out: Path
    questions: int
    searched: int
    seconds: float
    counts: Counts

    @property
    def evaluations_per_second(self) -> float:
        return self.counts.evaluations / self.seconds if self.searched else 0.0

    def records(self) -> "RecordReader":
        """The records of all questions. Raises RecordFileError."""
        from ..search.records.record_file import RecordReader

        return RecordReader(self.out)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "out": str(self.out),
            "questions": self.questions,
            "searched": self.searched,
            "seconds": self.seconds,
            "evaluations": self.counts.evaluations,
            "evaluations_per_second": self.evaluations_per_second,
            "right": self.counts.right,
            "corrected": self.counts.corrected,
            "shorter": self.counts.shorter,
        }


def run(job: SearchJob, console: "Console | None" = None) -> SearchResult:
    """Search every question that has no record yet; progress is shown on `console`.

    An interruption loses only the questions being searched. Raises InputError for settings that do
    not fit, RecordFileError if `out` holds another search, and what `polar_fx.load` and
    `polar_fx.compile` raise.
    """
    from ..judge.verdict import get_reward
    from ..search.methods.registry import get_method

    get_method(job.config.method)
    get_reward(job.config.reward)
    questions = job.asked.questions()
    templates = job.asked.templates(questions)
    workplace = _workplace(job)
    from ..search.records.record_file import RecordStore

    console = console or silent_console()
    opened = open_job(
        workplace,
        questions,
        templates=templates,
        console=console,
        workers=job.workers,
        generated=workplace.evaluator == "generation" or workplace.verify,
    )
    header = _header(job, questions, templates=templates, opened=opened)
    with RecordStore.open(job.out, header, restart=job.restart) as store:
        if len(store):
            console.print(
                f"{job.out} holds {len(store)} questions; {len(questions) - len(store)} are left",
                style="dim",
                markup=False,
            )
        rows = zip(opened.with_difficulty(questions), opened.encoded, strict=True)
        left = [row for row in rows if row[0].id not in store.done]
        began = time.perf_counter()
        found = _search(job, opened, rows=left) if left else iter(())
        del opened  # workers have models of their own
        counts = _append_all(found, store, total=len(left), console=console)
    return SearchResult(
        out=job.out,
        questions=len(questions),
        searched=len(left),
        seconds=time.perf_counter() - began,
        counts=counts,
    )


def _workplace(job: SearchJob) -> Workplace:
    """With one thread a worker on a cluster: this machine's number says nothing about its."""
    if job.ray is None:
        return job.workplace
    device = job.workplace.device
    if device is not None and device.partition(":")[0] != "cpu":
        raise InputError(
            f"a Ray cluster searches on CPUs, and the device is {device}; leave ray or device out"
        )
    return replace(job.workplace, threads=1)


def _header(
    job: SearchJob,
    questions: "Sequence[Question]",
    *,
    templates: "Mapping[str, Template]",
    opened: OpenJob,
) -> "SearchHeader":
    from ..questions.question import digest_of
    from ..search.records.records import SearchHeader

    place = opened.place
    asked = {
        "tasks": sorted(templates),
        "questions": len(questions),
        "split": job.asked.split_name,
        "data": [path.name for path in job.asked.data],
        "sha256": digest_of(questions),
    }
    prompt = {
        **prompt_keys(templates),
        "judge": place.workplace.evaluator,
        "deterministic": place.workplace.deterministic,
        "verify": place.workplace.verify,
        "dtype": place.workplace.weights,
    }
    library = place.compiled.library
    return SearchHeader(library.model_fingerprint, place.compiled.depth, job.config, asked, prompt)


def _search(job: SearchJob, opened: OpenJob, *, rows: Sequence[Row]) -> "Iterator[SearchRecord]":
    from ..search.ray_workers import search_on_ray
    from ..search.workers import search_in_processes

    place = opened.place
    if job.ray is not None:
        return search_on_ray(
            place.workplace, rows, config=job.config, workers=job.workers, address=job.ray or None
        )
    if job.workers > 1:
        return search_in_processes(place.workplace, rows, config=job.config, workers=job.workers)
    return place.search(iter(rows), job.config)


def _append_all(
    found: "Iterator[SearchRecord]", store: "RecordStore", *, total: int, console: "Console"
) -> Counts:
    """Append records as they come, with rate, time left, and counts."""
    from rich.progress import TextColumn

    counts, began = Counts(), time.perf_counter()
    with progress_bar(console, "searching", TextColumn("{task.fields[note]}")) as bar:
        line = bar.add_task("searching", total=total, note="")
        for number, record in enumerate(found, 1):
            store.append(record)
            counts.add(record)
            seconds = time.perf_counter() - began
            note = f"{counts.evaluations / seconds:.1f}/s, {counts}"
            bar.update(line, advance=1, note=note)
            is_shown = number % max(1, total // 20) == 0 or number == total
            if not console.is_terminal and is_shown:
                console.print(f"{number}/{total} questions, {seconds:.0f} s, {note}")
    return counts
