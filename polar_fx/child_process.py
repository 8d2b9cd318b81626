"""Python processes of ours that read requests, a line of JSON each, and answer with a line each."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

KILLED = -9  # the status of a process that somebody else ended: the system, or a user
_ROOT = str(Path(__file__).parent.parent)
_SECONDS_TO_END = 10.0  # for a process that has closed its pipe


class ChildEndedError(Exception):
    """A process ended, or broke off, in place of an answer.

    `status`: what it ended with, negative for a signal; `last_words`: the last line that it wrote
    to stderr, "" if none.
    """

    def __init__(self, status: int, last_words: str) -> None:
        super().__init__(f"it ended with status {status}: {last_words or 'it said nothing'}")
        self.status = status
        self.last_words = last_words


class ChildProcess:
    """A process that runs `code`, with the folder of this package as `sys.argv[1]` and `arguments`
    after it.

    It ends when this process does, because its stdin closes. One thread at a time may use it.
    """

    def __init__(self, code: str, *arguments: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, _ROOT, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="ascii",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Any) -> Any:
        """The answer to a request, both JSON values. Raises ChildEndedError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self.read()

    def read(self) -> Any:
        """The next line of the process, a JSON value. Raises ChildEndedError."""
        assert self._process.stdout is not None
        try:
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # no line, or half of one
            raise self._ended() from error

    def _ended(self) -> ChildEndedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)  # for its own status, not that of being killed
        self._process.kill()
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return ChildEndedError(status, said[-1] if said else "")

    def kill(self) -> None:
        """End the process, in the middle of a request if need be, and let go of its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was left unsent does not matter any more
                    pipe.close()


@contextlib.contextmanager
def answers() -> Iterator[TextIO]:
    """In a child: the stream that `read` of the parent reads.

    What else writes to stdout from here on, such as a compiler, goes nowhere.
    """
    with os.fdopen(os.dup(1), "w", encoding="ascii") as stream:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield stream


def answer(stream: TextIO, value: Any) -> None:
    """In a child: send an answer, a JSON value, at once."""
    stream.write(json.dumps(value) + "\n")
    stream.flush()
