"""Compiling in other processes: several regions at once, and whole programs while requests go on.

A worker reads one job a line on stdin and answers with one line; it ends when its parent does. Jobs
name a folder that holds exported graphs; what is compiled is written beside them.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CompileError
from ..passes.pipeline import PASSES, Pipeline
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
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def run(self, job: dict[str, Any]) -> None:
        """Do one job. Raises CompileError with the worker's reason."""
        if self._process is None or self._process.poll() is not None:
            self.close()  # what is left of one that ended
            root = str(Path(__file__).parent.parent.parent)
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, root, str(self._nice)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # no answer, or half of one
            raise CompileError(f"a compile worker ended{self._last_words()}") from error
        if (reason := answer.get("error")) is not None:
            raise CompileError(f"compiling failed in a worker: {reason}")

    def _last_words(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return ": it was killed; free some memory, or compile with workers=0"
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return f" with status {status}: {lines[-1].strip() if lines else 'it said nothing'}"

    def close(self) -> None:
        """End the process, in the middle of a job if need be.

        A forked child leaves its parent's worker alone.
        """
        if self._process is None or self._owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left unsent does not matter any more
                    pipe.close()
        self._process = None


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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # compilers may print; the pipe is for answers
    for line in sys.stdin:
        try:
            _do(json.loads(line))
            answer: dict[str, str] = {}
        except Exception as error:
            answer = {"error": compiler_reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


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
        compose(backend, job["whole"], folder)
    backend.build(folder)
