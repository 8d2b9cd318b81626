"""The model of a command that labels questions: loaded once, its verdicts and features kept in
files.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, KvOverflowError
from .options import status
from .questions import encode, measured_difficulty, measuring_questions, row_length, templates_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..predictor.features import Features
    from ..program import Program
    from ..questions import EncodedQuestion, PromptTemplate, Question
    from ..search.records.records import SearchHeader, SearchRecord
    from ..training.verdict_table import Rows, VerdictTable


class Labeller:
    """Loads and compiles what the options name (`add_model_arguments`, --workers).

    `encoded` has the questions as tokens, by id; those of `also`, in the built-in prompt of that
    name, fit the model, too. Raises InputError if `header` is of another model.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        templates: "Mapping[str, PromptTemplate]",
        questions: "Sequence[Question]",
        header: "SearchHeader | None" = None,
        generated: bool = False,
        also: "tuple[Sequence[Question], str]" = ((), "plain"),
    ) -> None:
        import torch

        from ..models import load, position_limit
        from ..search.config import SearchConfig
        from ..search.workers import Workplace

        with status().status("loading the model ..."):
            model, self.tokenizer = load(options.model, options.dtype, options.device)
        options.dtype = str(model.dtype).removeprefix("torch.")
        found = encode(self.tokenizer, questions, templates)
        self.encoded = {e.id: e for e in found}
        limit, others, theirs = position_limit(model), also[0], templates_of(also[1], also[0])
        measuring = measuring_questions(questions)
        every = [*found, *encode(self.tokenizer, measuring, templates)]
        length = row_length(every, [*questions, *measuring], templates, limit, generated)
        if others:
            length = max(
                length,
                row_length(encode(self.tokenizer, others, theirs), others, theirs, limit, False),
            )
        threads = (
            max(1, torch.get_num_threads() // options.workers) if options.workers > 1 else None
        )
        self.workers, self.templates, self._config = (
            options.workers,
            templates,
            SearchConfig(method="listed"),
        )
        self.workplace = Workplace(
            options.model,
            options.dtype,
            options.backend,
            length,
            threads=threads,
            templates=dict(templates),
            device=options.device,
        )
        with status().status("compiling ..."):
            self.place = self.workplace.open(questions, (model, self.tokenizer))
            for batch in (1, 2):
                self.place.compiled.warmup((None,), batch)
        self.compiled = self.place.compiled
        self.depth = self.compiled.depth
        self.model_fingerprint: str = self.compiled.library.model_fingerprint
        if header is not None and header.model != self.model_fingerprint:
            raise InputError(
                f"the records are of a model of fingerprint {header.model[:12]}, this one's is "
                f"{self.model_fingerprint[:12]} (dtype {header.prompt.get('dtype', 'not noted')} "
                f"there, {options.dtype} here); name that model and dtype"
            )

    def encode(self, questions: "Sequence[Question]", prompt: str) -> "list[EncodedQuestion]":
        """Other questions as tokens, in the built-in prompt of that name.

        Raises KvOverflowError if one does not fit.
        """
        found = encode(self.tokenizer, questions, templates_of(prompt, questions))
        longest = max(found, key=lambda e: len(e.prefix) + len(e.prompt), default=None)
        if (
            longest is not None
            and len(longest.prefix) + len(longest.prompt) > self.compiled.pool.max_length
        ):
            most = self.compiled.pool.max_length
            raise KvOverflowError(
                f"question {longest.id!r} does not fit the {most} tokens that the test questions "
                "need"
            )
        return found

    def with_difficulty(self, questions: "Sequence[Question]") -> "list[Question]":
        """The questions, those of built-in tasks with the level of the identity's accuracy on train
        questions of their cell.
        """
        asked = measuring_questions(questions)
        others = encode(self.tokenizer, asked, self.templates)
        with status().status("measuring the difficulty of the questions ..."):
            return measured_difficulty(questions, asked, others, self.place)

    def table(self, path: Path, rows: "Rows", programs: "Sequence[Program]") -> "VerdictTable":
        """Every program on every question, kept at `path`; shows progress."""
        from ..training.verdict_table import VerdictTable

        listed = tuple(p for p in dict.fromkeys(programs) if not p.is_identity)
        return VerdictTable.of(self.records(path, rows, {q.id: listed for q, _ in rows}), listed)

    def records(
        self, path: Path, rows: "Rows", programs: "Mapping[str, tuple[Program, ...]]"
    ) -> "list[SearchRecord]":
        """Each question's own programs on it, kept at `path`; shows progress."""
        from dataclasses import replace

        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from ..search.workers import search_in_processes
        from ..training.verdict_table import listed_records

        def run(left: Any, listed: Any) -> Any:
            workplace = replace(self.workplace, programs=listed)
            if self.workers > 1:
                return search_in_processes(workplace, left, self._config, self.workers)
            return replace(self.place, workplace=workplace).search(iter(left), self._config)

        bar = Progress(
            TextColumn(path.stem),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=status(),
        )
        began, pairs = time.perf_counter(), sum(len(programs[q.id]) + 1 for q, _ in rows)
        with bar:
            line = bar.add_task("", total=len(rows))

            def progress(done: int, total: int) -> None:
                bar.update(line, completed=done)
                if not bar.console.is_terminal and done % max(1, total // 10) == 0:
                    seconds = time.perf_counter() - began
                    bar.console.print(
                        f"{path.stem}: {done}/{total} questions, {pairs} evaluations in all, "
                        f"{seconds:.0f} s"
                    )

            how: dict[str, Any] = {task: template.key for task, template in self.templates.items()}
            how |= {"judge": "teacher-forcing", "dtype": self.workplace.dtype}
            return listed_records(
                path, rows, programs, self.model_fingerprint, self.depth, how, run, progress
            )

    def states(self, rows: "Rows", features: "Features") -> "list[Tensor]":
        """Hidden states of each row, [T, d] as the model has them."""
        from ..training.collect import token_features

        with status().status(f"features of {len(rows)} questions ..."):
            return token_features(self.compiled, [encoded for _, encoded in rows], features)

    def features(self, rows: "Rows", features: "Features") -> "Tensor":
        """Pooled features of the rows, f32[N, F]."""
        from ..training.collect import pooled_features

        with status().status(f"features of {len(rows)} questions ..."):
            return pooled_features(self.compiled, [encoded for _, encoded in rows], features)
