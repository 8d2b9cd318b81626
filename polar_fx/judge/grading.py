"""Whether generated text answers a question, decided by math-verify.

math-verify runs in a process of its own (`grading_worker.py`): generated text can be an expression
that takes forever or all memory, and its own time limit works in the main thread only and not
inside one long operation on large numbers.
"""

import atexit
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..child_process import KILLED, ChildEndedError, ChildProcess
from ..environment import install_command
from ..errors import InputError
from ..questions.question import Question

_MAX_LENGTH = 1000  # characters; a longer answer is equal as a string or not at all

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from polar_fx.judge.grading_worker import "
    "main; main()"
)

_INTEGER = re.compile(r"[+-]?[0-9]+")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_TWO_NUMBERS = re.compile(r"\d\s+\d")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Extracted:
    """The answer a text gives; `boxed`: whether it stood in a \\boxed{}."""

    answer: str
    boxed: bool


def extract(text: str, stops: Iterable[str] = ()) -> Extracted:
    """The answer in generated text (decoded without special tokens): what the first \\boxed{}
    holds, else all of it.

    What follows the first of `stops` does not count (`DecodeStop.strings`). A box that is never
    closed is no box.
    """
    for stop in stops:
        text = text.partition(stop)[0]
    start = text.find("\\boxed{")
    if start >= 0:
        inside = text[start + len("\\boxed{") :]
        if (end := _closing(inside)) is not None:
            return Extracted(inside[:end].strip(), True)
    return Extracted(text.strip(), False)


def grade(text: str, question: Question, *, stops: Iterable[str] = ()) -> bool:
    """Whether the answer in `text` (see `extract`) is one of the question's accepted answers.

    Answers in words are compared as text, without regard to case; others also by math-verify, where
    1/2 is 0.5. Where a plain number is asked for, a calculation of it (12 + 7 for 19) is not an
    answer: it may only repeat the question. What math-verify cannot read, or not within seconds, is
    wrong. Raises InputError when math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "grading needs math-verify, which is not installed; pip install math-verify, or "
            f"{install_command('search')}"
        )
    answer = extract(text, stops).answer
    return any(_equal(accepted, answer) for accepted in question.answers)


@lru_cache(maxsize=65536)
def _equal(accepted: str, answer: str) -> bool:
    accepted, answer = _plain(accepted), _plain(answer)
    if not answer:
        return False
    if answer == accepted:
        return True
    if _WORDS.fullmatch(accepted):
        return answer.casefold() == accepted.casefold()
    if _INTEGER.fullmatch(accepted):
        if not re.search(r"\d", answer):
            return False
        if _INTEGER.fullmatch(answer):
            return _signed(answer) == _signed(accepted)
    if len(answer) > _MAX_LENGTH or _TWO_NUMBERS.search(answer):  # math-verify reads "1 2" as 3
        return False
    # a brace too many would end the box that math-verify gets the answer in
    return _closing(answer + "}") == len(answer) and _WORKER.equal(accepted, answer)


def _signed(integer: str) -> str:
    """One text for equal integers; int() would refuse thousands of digits."""
    digits = integer.lstrip("+-").lstrip("0")
    return "-" + digits if digits and integer.startswith("-") else digits


def _plain(text: str) -> str:
    """Without what changes only how an answer looks."""
    text = re.sub(r"\\[,!;:]", "", text.strip())
    text = _TEXT_COMMAND.sub(r"\1", text) if _TEXT_COMMAND.fullmatch(text) else text
    if len(text) > 2 and text.startswith("$") and text.endswith("$"):
        text = text.strip("$")
    return " ".join(text.split()).rstrip(".,; ")


def _closing(text: str) -> int | None:
    """Where the brace that is open before `text` closes."""
    depth, at = 1, 0
    while at < len(text):
        if text[at] == "\\":
            at += 1  # the next character is escaped
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return at
        at += 1
    return None


class _Worker:
    """The process math-verify runs in; started when first needed, and again after it gave up on an
    answer.
    """

    def __init__(self) -> None:
        self._process: ChildProcess | None = None
        self._lock = threading.Lock()

    def equal(self, accepted: str, answer: str) -> bool:
        """What math-verify says; False where it ran out of time or memory."""
        with self._lock:
            for _ in range(2):
                process = self._process or self._start()
                try:
                    return bool(process.ask([accepted, answer]))
                except ChildEndedError as ended:  # most likely by its own clock
                    self._close()
                    if ended.status != KILLED:
                        return False
                except BaseException:
                    # interrupted: what it says next would be taken for the answer to the next
                    # question
                    self._close()
                    raise
        raise InputError(
            f"the math-verify process was killed twice while it compared {answer[:80]!r} with "
            f"{accepted[:80]!r}; free some memory"
        )

    def _start(self) -> ChildProcess:
        self._process = process = ChildProcess(_START)
        atexit.register(self.close)
        try:
            process.read()  # READY
        except ChildEndedError as ended:
            self._close()
            raise InputError(
                f"math-verify cannot be used: its process ended with status {ended.status}; "
                f"see whether `{sys.executable} -c 'import math_verify'` works, and install it "
                "again if not"
            ) from ended
        return process

    def close(self) -> None:
        """End the process; the next answer starts another."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        process, self._process = self._process, None
        atexit.unregister(self.close)
        if process is not None:
            process.kill()


_WORKER = _Worker()
_PARENTS: list[Any] = []  # held, because letting go of a process that runs is a warning


def _forked() -> None:
    """A forked child leaves its parent's process, and a lock that another thread may have held,
    alone.
    """
    global _WORKER
    atexit.unregister(_WORKER.close)
    _PARENTS.append(_WORKER)
    _WORKER = _Worker()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
