"""How many prompts wait or run at a server, and how many may."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..output.plain_text import count
from .measures import Measures
from .requests import RequestError


class Waiting:
    """Counts prompts that wait or run; to be used by one thread, that of the event loop."""

    def __init__(self, most: int, measures: Measures) -> None:
        self.prompts, self.most, self._measures = 0, most, measures

    def check_room(self) -> None:
        """Raise RequestError, with status 503, if as many wait or run as may."""
        if self.prompts >= self.most:
            what = f"{count(self.prompts, 'prompt')} wait or run already; try again later"
            raise RequestError(what, code="overloaded", status=503)

    @contextmanager
    def holding(self, prompts: int) -> Iterator[None]:
        """Count these until the end of the block."""
        self.prompts += prompts
        self._measures.waiting.set(self.prompts)
        try:
            yield
        finally:
            self.prompts -= prompts
            self._measures.waiting.set(self.prompts)
