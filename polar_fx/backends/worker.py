"""Compiling in other processes: several regions at once, and whole programs while requests go on.

A worker reads one job a line on stdin and answers with one line; it ends when its parent does. Jobs
name a folder that holds exported graphs; what is compiled is written beside them.
"""

import contextlib
import json
import os
import queue
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..child_process import KILLED, ChildEndedError, ChildProcess, answer, answers
from ..errors import CompileError
from ..passes.pipeline import PASSES, PassRecord, Pipeline, keep_records, kept_records
from .base import Backend, PersistentBackend

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from polar_fx.backends.worker import main; main()"
)


_LAST_LINES = 3  # of a compiler's output, which ends with what went wrong


def compiler_reason(error: Exception) -> str:
    """One line of an error: its first line, what a compiler itself said (the first line about an
    error, the last ones), and what may be done about it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    output = lines[lines.index("Output:") + 1 :] if "Output:" in lines else []
    first = [line for line in output if "error" in line.lower()][:1]
    said = list(dict.fromkeys((*first, *output[-_LAST_LINES:])))
    if said:
        reason += f": {' | '.join(said)}"
    if said and " " in (place := tempfile.gettempdir()):
        reason += (
            f"; the folder for temporary files, {place!r}, has a space in its name: set "
            "TMPDIR to one without"
        )
    return reason


def describe(backend: Backend) -> dict[str, Any] | None:
    """A backend as JSON values, or None if a worker could not make it again (passes or a class of
    the user's own).
    """
    from . import BACKENDS

    known = type(backend) is BACKENDS.get(backend.name) and all(
        type(p) is PASSES.get(p.name) for p in backend.passes
    )
    if not known or not isinstance(backend, PersistentBackend) or not backend.in_workers:
        return None
    try:
        return json.loads(
            json.dumps(
                {
                    "backend": backend.name,
                    "options": dict(backend.options),
                    "passes": str(Pipeline(backend.passes)),
                }
            )
        )
    except TypeError:
        return None


class Worker:
    """A worker process, started for its first job and again if it ended; `run` does a job and waits
    for it.
    """

    def __init__(self, nice: int = 0) -> None:
        self._nice = nice
        self._process: ChildProcess | None = None
        self._owner = os.getpid()

    def run(self, job: dict[str, Any]) -> None:
        """Do one job, and keep the records of its passes (see `kept_records`). Raises CompileError
        with the worker's reason.
        """
        if self._process is None or not self._process.is_running:
            self.close()  # what is left of one that ended
            self._process = ChildProcess(_START, str(self._nice))
        try:
            reply = self._process.ask(job)
        except ChildEndedError as ended:
            raise CompileError(f"a compile worker ended{_how(ended)}") from ended
        if (reason := reply.get("error")) is not None:
            raise CompileError(f"compiling failed in a worker: {reason}")
        keep_records(PassRecord(**record) for record in reply.get("passes", ()))

    def close(self) -> None:
        """End the process, in the middle of a job if need be.

        A forked child leaves its parent's worker alone.
        """
        if self._process is None or self._owner != os.getpid():
            return
        self._process.kill()
        self._process = None


def _how(ended: ChildEndedError) -> str:
    if ended.status == KILLED:
        return ": it was killed; free some memory, or, in Python, compile with workers=0"
    return f" with status {ended.status}: {ended.last_words or 'it said nothing'}"


class WorkerPool:
    """Workers that are started when first needed, at most `size`, and shared by threads."""

    def __init__(self, size: int) -> None:
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._all = [Worker() for _ in range(size)]
        for worker in self._all:
            self._idle.put(worker)

    def run(self, job: dict[str, Any]) -> None:
        """Do a job on the next idle worker. Raises CompileError."""
        worker = self._idle.get()
        try:
            worker.run(job)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in self._all:
            worker.close()


@contextlib.contextmanager
def worker_pool(size: int) -> Iterator[WorkerPool]:
    """A pool that is closed at the end."""
    pool = WorkerPool(size)
    try:
        yield pool
    finally:
        pool.close()


def main() -> None:
    """Serve jobs from stdin until it closes."""
    if hasattr(os, "nice"):
        os.nice(int(sys.argv[2]))
    with answers() as stream:
        for line in sys.stdin:
            try:
                with kept_records() as passes:
                    _do(json.loads(line))
                reply: dict[str, Any] = {"passes": [asdict(record) for record in passes]}
            except Exception as error:
                reply = {"error": compiler_reason(error)}
            answer(stream, reply)


def _do(job: dict[str, Any]) -> None:
    import torch

    from . import BACKENDS
    from .whole import compose

    backend = BACKENDS[job["backend"]](
        options=job["options"], passes=Pipeline.parse(job["passes"]).passes
    )
    assert isinstance(backend, PersistentBackend)
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    if "whole" in job:
        compose(backend, job["whole"], folder=folder)
    backend.build(folder)
