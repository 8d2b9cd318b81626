"""A request to the engine, as who asked sees it: tokens as they come, a result, a way to cancel."""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Literal

from ..program import Program
from .sampling import Sampler, Sampling

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generated:
    """What came of a request.

    `tokens` are the new ones, one that stopped it included; `text` without what stopped it, None
    without a tokenizer. `probability` is the predicted one of being right, where a program was
    chosen for the request.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish: Finish
    program: Program
    probability: float | None = None


class Request:
    """Iterate for the tokens as they come; `result` waits for all of them; `cancel` ends it.

    Any thread may do so.
    """

    def __init__(
        self, prompt: Sequence[int], program: Program | None, sampling: Sampling, number: int
    ) -> None:
        self.prompt, self.program, self.sampling = tuple(prompt), program, sampling
        self.number = number  # requests are served in this order
        self.probability: float | None = None
        self.tokens: list[int] = []
        self.sampler = Sampler(sampling, prompt)
        self.is_cancelled = False
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._generated: Generated | None = None
        self._error: BaseException | None = None

    # ----------------------------------------------------------------------------------- who asked

    def __iter__(self) -> Iterator[int]:
        """Each new token once, as it comes.

        Raises what ended the request, if that was an error.
        """
        while (token := self._news.get()) is not None:
            yield token
        self._news.put(None)  # whoever iterates later ends as well
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Generated:
        """What came of it.

        Raises what ended it, if that was an error, and TimeoutError after `timeout` seconds.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.number} is not done after {timeout} s")
        if self._error is not None:
            raise self._error
        if self._generated is None:
            raise CancelledError
        return self._generated

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def cancel(self) -> None:
        """End it before its next token; what it holds is given back."""
        self.is_cancelled = True

    # ----------------------------------------------------------------------------------- the engine

    def say(self, token: int) -> None:
        """A token was generated."""
        self.tokens.append(token)
        self._news.put(token)

    def finish(self, generated: Generated | None, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        self._generated, self._error = generated, error
        self._done.set()
        self._news.put(None)
