"""The model of a job that labels questions: loaded once, its verdicts and features kept in
files.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, KvOverflowError
from .opening import OtherQuestions, open_job
from .progress import progress_bar, silent_console
from .questions import encode, prompt_keys, templates_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..predictor.features import Features
    from ..program import Program
    from ..questions import EncodedQuestion, Question, Template
    from ..search.records.records import SearchHeader, SearchRecord
    from ..search.workers import Workplace
    from ..training.verdict_table import Rows, VerdictTable


class Labeller:
    """Loads and compiles what `workplace` names, and judges in `workers` processes.

    `encoded` has the questions as tokens, by id; those of `other` fit the model, too. With
    `generated`, answers of any length do. Progress is shown on `console` (None: nowhere). Raises
    what `polar_fx.load` and `polar_fx.compile` raise.
    """

    def __init__(
        self,
        workplace: "Workplace",
        templates: "Mapping[str, Template]",
        *,
        questions: "Sequence[Question]",
        workers: int = 1,
        console: "Console | None" = None,
        generated: bool = False,
        other: OtherQuestions | None = None,
    ) -> None:
        from ..search.config import SearchConfig

        self.console = console or silent_console()
        self._job = open_job(
            workplace,
            questions,
            templates=templates,
            console=self.console,
            workers=workers,
            generated=generated,
            other=other,
        )
        self.place, self.tokenizer = self._job.place, self._job.tokenizer
        self.workers, self.templates = workers, templates
        self.workplace, self.compiled = self.place.workplace, self.place.compiled
        self.depth: int = self.compiled.depth
        self.model_fingerprint: str = self.compiled.library.model_fingerprint
        self.encoded = {e.id: e for e in self._job.encoded}
        self._config = SearchConfig(method="listed")

    def model_names(self) -> dict[str, str]:
        """`named_model` of the workplace."""
        return named_model(self.workplace)

    def check_model(self, header: "SearchHeader") -> None:
        """Raise InputError if records with this header are of another model."""
        if header.model != self.model_fingerprint:
            raise InputError(
                f"the records are of a model of fingerprint {header.model[:12]}, this one's is "
                f"{self.model_fingerprint[:12]} (dtype {header.prompt.get('dtype', 'not noted')} "
                f"there, {self.workplace.weights} here); name that model and dtype"
            )

    def encode(self, questions: "Sequence[Question]", prompt: str) -> "list[EncodedQuestion]":
        """Other questions as tokens, in the built-in prompt of that name.

        Raises KvOverflowError if one does not fit.
        """
        found = encode(self.tokenizer, questions, templates=templates_of(prompt, questions))
        most = self.compiled.pool.max_length
        longest = max(found, key=lambda e: len(e.prefix) + len(e.prompt), default=None)
        if longest is not None and len(longest.prefix) + len(longest.prompt) > most:
            raise KvOverflowError(
                f"question {longest.id!r} does not fit the {most} tokens that the test questions "
                "need"
            )
        return found

    def with_difficulty(self, questions: "Sequence[Question]") -> "list[Question]":
        """Questions among those of the job, those of built-in tasks with the level of the
        identity's accuracy on train questions of their cell.
        """
        with self.console.status("measuring the difficulty of the questions ..."):
            return self._job.with_difficulty(questions)

    def table(self, path: Path, rows: "Rows", *, programs: "Sequence[Program]") -> "VerdictTable":
        """Every program on every question, kept at `path`; shows progress."""
        from ..training.verdict_table import VerdictTable

        listed = tuple(p for p in dict.fromkeys(programs) if not p.is_identity)
        return VerdictTable.of(
            self.records(path, rows, programs={q.id: listed for q, _ in rows}), listed
        )

    def records(
        self, path: Path, rows: "Rows", *, programs: "Mapping[str, tuple[Program, ...]]"
    ) -> "list[SearchRecord]":
        """Each question's own programs on it, kept at `path`; shows progress."""
        from ..training.verdict_table import listed_records

        pairs = sum(len(programs[q.id]) + 1 for q, _ in rows)
        how: dict[str, Any] = {
            **prompt_keys(self.templates),
            "judge": "teacher-forcing",
            "dtype": self.workplace.weights,
        }
        began = time.perf_counter()
        with progress_bar(self.console, path.stem) as bar:
            line = bar.add_task("", total=len(rows))

            def progress(done: int, total: int) -> None:
                bar.update(line, completed=done)
                if not self.console.is_terminal and done % max(1, total // 10) == 0:
                    self.console.print(
                        f"{path.stem}: {done}/{total} questions, {pairs} evaluations in all, "
                        f"{time.perf_counter() - began:.0f} s"
                    )

            return listed_records(
                path,
                rows,
                programs=programs,
                model=self.model_fingerprint,
                depth=self.depth,
                prompt=how,
                run=self._run,
                progress=progress,
            )

    def _run(
        self, rows: "Rows", programs: "Mapping[str, tuple[Program, ...]]"
    ) -> "Iterable[SearchRecord]":
        from ..search.workers import search_in_processes

        workplace = replace(self.workplace, programs=programs)
        if self.workers > 1:
            return search_in_processes(workplace, rows, config=self._config, workers=self.workers)
        return replace(self.place, workplace=workplace).search(iter(rows), self._config)

    def states(self, rows: "Rows", features: "Features") -> "list[Tensor]":
        """Hidden states of each row, [T, d] as the model has them."""
        from ..training.collect import token_features

        with self.console.status(f"features of {len(rows)} questions ..."):
            return token_features(
                self.compiled, [encoded for _, encoded in rows], features=features
            )

    def features(self, rows: "Rows", features: "Features") -> "Tensor":
        """Pooled features of the rows, f32[N, F]."""
        from ..training.collect import pooled_features

        with self.console.status(f"features of {len(rows)} questions ..."):
            return pooled_features(
                self.compiled, [encoded for _, encoded in rows], features=features
            )


def named_model(workplace: "Workplace") -> dict[str, str]:
    """What the model is called, in what dtype it is, and how its weights are quantized, if they
    are; for notes that people read.
    """
    from ..models import DEFAULT_NAME

    named = workplace.model or DEFAULT_NAME
    place = Path(named).expanduser()
    names = {
        "model_name": place.resolve().name if place.exists() else named,
        "dtype": workplace.dtype,
    }
    if workplace.quantize is not None:
        names["quantize"] = workplace.quantize
    return names
