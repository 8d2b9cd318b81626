"""A request to the engine, as who asked sees it: tokens as they come, a result, a way to cancel."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Literal

from ..program import Program
from .sampling import Sampler, Sampling

log = logging.getLogger("polar_fx.engine")

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generated:
    """What came of a request.

    `tokens` are the new ones, one that stopped it included; `text` without what stopped it, None
    without a tokenizer. `probability` is the predicted one of being right, where a program was
    chosen for the request; `rows` says how many rows at most decoded together with it, itself
    included; `seconds_to_first` and `seconds` how long after it was added the first and the last
    token came.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish: Finish
    program: Program
    probability: float | None = None
    rows: int = 1
    seconds_to_first: float = 0.0
    seconds: float = 0.0


class Request:
    """Iterate for the tokens as they come; `result` waits for all of them; `cancel` ends it.

    Any thread may do so.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        program: Program | None,
        *,
        sampling: Sampling,
        number: int,
        on_news: "Callable[[Request], None] | None" = None,
    ) -> None:
        self.prompt, self.program, self.sampling = tuple(prompt), program, sampling
        self.number = number  # requests are served in this order
        self.probability: float | None = None
        self.rows = 1  # that decoded together with it, at most
        self._added = time.perf_counter()
        self.seconds_to_first = self.seconds = 0.0
        self._on_news = on_news
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
        self.seconds = time.perf_counter() - self._added
        self.seconds_to_first = self.seconds_to_first or self.seconds
        self.tokens.append(token)
        self._news.put(token)
        self._tell()

    def finish(self, generated: Generated | None, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        self._generated, self._error = generated, error
        self._done.set()
        self._news.put(None)
        self._tell()

    def _tell(self) -> None:
        if self._on_news is None:
            return
        try:
            self._on_news(self)
        except Exception:  # the other rows go on, and so does this one
            log.exception("whoever waits for request %d could not be told", self.number)
            self._on_news = None
