"""Searching in several processes: each has a model of its own, takes the next question when it has
room and hands back records.

The parent alone writes the store. Processes are started anew (spawn): a forked torch may deadlock.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import CompileError, PolarError
from ..output.others import hush_others
from ..program import Program
from ..questions.question import EncodedQuestion, Question
from ..questions.templates import Template
from .config import SearchConfig
from .lockstep import Evaluator, run_searches
from .records.records import SearchRecord

Row = tuple[Question, EncodedQuestion]


@dataclass(frozen=True)
class Workplace:
    """All that a process needs to judge programs: what to load, how to compile it, how to judge.

    `evaluator` is "teacher-forcing" or "generation"; `verify` judges valid programs once more by
    generation. `threads` None shares the processors among `workers`. With `programs`, by question
    id, these are looked at instead of those a search would choose.
    """

    model: str | None = None
    dtype: str = "float32"
    backend: str = "auto"
    max_length: int = 256
    deterministic: bool = False
    evaluator: str = "teacher-forcing"
    verify: bool = False
    in_flight: int = 32
    cache_bytes: int = 2 << 30
    threads: int | None = None
    templates: Mapping[str, Template] = field(default_factory=dict)
    programs: Mapping[str, tuple[Program, ...]] | None = None
    device: str | None = None
    quantize: str | None = None

    @property
    def weights(self) -> str:
        """How they are held, for records: "bfloat16", or "bfloat16, int4"."""
        return ", ".join(filter(None, (self.dtype, self.quantize)))

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer. Raises what `polar_fx.load` raises."""
        from ..models import load

        return load(self.model, self.dtype, device=self.device, quantize=self.quantize)

    def open(
        self, questions: Sequence[Question], loaded: tuple[Any, Any] | None = None
    ) -> "OpenWorkplace":
        """Load, unless model and tokenizer are there, and compile.

        Raises what `polar_fx.load` and `polar_fx.compile` raise.
        """
        import torch
        from transformers.utils import logging

        from ..compiled import compile
        from ..judge.by_generation import Generation
        from ..judge.teacher_forcing import TeacherForcing

        logging.disable_progress_bar()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model, tokenizer = loaded or self.load()
        compiled = compile(
            model, self.backend, max_length=self.max_length, deterministic=self.deterministic
        )
        by_id = {q.id: q for q in questions}
        generation = Generation(compiled, tokenizer, questions=by_id, templates=self.templates)
        forcing = TeacherForcing(
            compiled, deterministic=self.deterministic, cache_bytes=self.cache_bytes
        )
        evaluator = {"teacher-forcing": forcing, "generation": generation}[self.evaluator]
        return OpenWorkplace(
            self, compiled, evaluator, generation if self.verify else None, forcing
        )


@dataclass(frozen=True)
class OpenWorkplace:
    """A workplace with its model loaded."""

    workplace: Workplace
    compiled: Any
    evaluator: Evaluator
    verifier: Evaluator | None
    forcing: Any
    """Judges by teacher forcing, whatever the evaluator is."""

    def search(self, rows: Iterator[Row], config: SearchConfig) -> Iterator[SearchRecord]:
        """A record a question, as they finish."""
        place, library = self.workplace, self.compiled.library
        return run_searches(
            rows,
            self.evaluator,
            self.compiled.depth,
            config,
            in_flight=place.in_flight,
            verifier=self.verifier,
            programs=place.programs,
            runs=library.runs if library.table.owners else None,
        )


def search_in_processes(
    workplace: Workplace, rows: Sequence[Row], *, config: SearchConfig, workers: int
) -> Iterator[SearchRecord]:
    """Records as they finish, from `workers` processes.

    Raises what went wrong in one of them; ends them all when closed.
    """
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    results: Any = context.Queue()
    for row in (*rows, *[None] * workers):  # None: no more
        todo.put(row)
    questions = [question for question, _ in rows]
    share = -(-len(rows) // workers)  # or the first to be ready would take everything
    workplace = replace(workplace, in_flight=max(1, min(workplace.in_flight, share)))
    processes = [
        context.Process(
            target=_work, args=(workplace, questions, config, todo, results), daemon=True
        )
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        for _ in rows:
            yield _next(results, processes)
    finally:
        for process in processes:
            process.terminate()
        for channel in (todo, results):
            channel.cancel_join_thread()
            channel.close()
        for process in processes:
            process.join()


def _next(results: Any, processes: Sequence[Any]) -> SearchRecord:
    while True:
        with contextlib.suppress(queue.Empty):
            found = results.get(timeout=1.0)
            if isinstance(found, BaseException):
                raise found
            return found
        if lost := [p for p in processes if p.exitcode not in (None, 0)]:
            # a record may be on its way still
            with contextlib.suppress(queue.Empty):
                found = results.get(timeout=1.0)
                if isinstance(found, SearchRecord):
                    return found
            raise CompileError(
                f"a search process ended with exit status {lost[0].exitcode}, maybe for lack of "
                "memory; search with fewer workers or fewer questions in flight"
            )


def _work(
    workplace: Workplace,
    questions: Sequence[Question],
    config: SearchConfig,
    todo: Any,
    results: Any,
) -> None:
    hush_others()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(1)  # the terminal stays usable
    try:
        place = workplace.open(questions)
        for record in place.search(_taken(todo), config):
            results.put(record)
    except PolarError as error:
        results.put(error)
    except Exception as error:
        # whatever it is, the parent must not wait for records that will not come
        results.put(CompileError(f"a search process failed: {type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A parent that was killed can end nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _taken(todo: Any) -> Iterator[Row]:
    while (row := todo.get()) is not None:
        yield row
