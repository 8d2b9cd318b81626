"""What somebody may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'search'?` for the known name that is closest to the given one; nothing where
    none is close.
    """
    close = difflib.get_close_matches(given.lower(), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
