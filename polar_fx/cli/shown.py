"""Text on stdout while it is generated."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.stable_text import StableText


class Shown:
    """Prints a text while its tokens come: as much of it as later ones cannot change."""

    def __init__(self, text: "StableText") -> None:
        self._text, self._ids, self._done = text, list[int](), ""

    def add(self, ids: list[int]) -> None:
        """The next tokens."""
        self._ids += ids
        self._print(self._text.known(self._ids))

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._print(self._text.whole(self._ids))
        print(flush=True)

    def _print(self, known: str) -> None:
        print(known[len(self._done) :], end="", flush=True)
        self._done = max(self._done, known, key=len)
