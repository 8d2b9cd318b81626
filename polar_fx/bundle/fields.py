"""Reading plain values that came from elsewhere: every field there, none unknown, each of its type
and within bounds.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import AGAIN, BundleError

SHA256 = re.compile(r"[0-9a-f]{64}")


class Fields:
    """The fields of one JSON object of a file.

    Everything raises BundleError naming the file and the field.
    """

    def __init__(self, path: Path, where: str, *, value: Any, names: tuple[str, ...]) -> None:
        self.path, self.where = path, where
        if type(value) is not dict:
            raise self.wrong("", f"must be an object, got {_shown(value)}")
        unknown, missing = sorted(set(value) - set(names)), [n for n in names if n not in value]
        if unknown:
            raise self.wrong(unknown[0], "is not a field of this format")
        if missing:
            raise self.wrong(missing[0], "is missing")
        self._values = value

    def wrong(self, name: str, what: str, *, remedy: str = AGAIN) -> BundleError:
        """An error about the field `name`."""
        full = f"{self.where}.{name}" if self.where and name else self.where or name
        return BundleError(self.path, f"{full or 'the whole'} {what}", remedy=remedy)

    def text(self, name: str, pattern: re.Pattern[str] | None = None, *, most: int = 256) -> str:
        """A string of at most `most` printable characters."""
        value = self._values[name]
        if type(value) is not str:
            raise self.wrong(name, f"must be text, got {_shown(value)}")
        if len(value) > most:
            raise self.wrong(name, f"has {len(value):,} characters, at most {most:,} are allowed")
        if not value.isprintable() or (pattern is not None and not pattern.fullmatch(value)):
            raise self.wrong(name, f"is malformed: {_shown(value)}")
        return value

    def number(self, name: str, low: int, *, high: int) -> int:
        """A whole number within bounds; true and 1.0 are none."""
        value = self._values[name]
        if type(value) is not int:
            raise self.wrong(name, f"must be a whole number, got {_shown(value)}")
        if not low <= value <= high:
            raise self.wrong(name, f"is {_shown(value)}, outside {low:,} .. {high:,}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._values[name]
        if type(value) is not bool:
            raise self.wrong(name, f"must be true or false, got {_shown(value)}")
        return value

    def items(self, name: str, least: int, *, most: int) -> list[Any]:
        """A list."""
        value = self._values[name]
        if type(value) is not list:
            raise self.wrong(name, f"must be a list, got {_shown(value)}")
        if not least <= len(value) <= most:
            raise self.wrong(name, f"has {len(value):,} entries, outside {least:,} .. {most:,}")
        return value

    def texts(self, name: str, least: int, *, most: int, each: int = 256) -> list[str]:
        """A list of strings, none of them twice."""
        values = self.items(name, least, most=most)
        for value in values:
            if type(value) is not str or len(value) > each:
                raise self.wrong(
                    name, f"must hold text of at most {each:,} characters, got {_shown(value)}"
                )
        if len(set(values)) != len(values):
            raise self.wrong(name, f"holds {_shown(Counter(values).most_common(1)[0][0])} twice")
        return values

    def mapping(self, name: str, most: int) -> dict[str, Any]:
        """An object with names of its own."""
        value = self._values[name]
        if type(value) is not dict or len(value) > most:
            raise self.wrong(
                name, f"must be an object of at most {most:,} names, got {_shown(value)}"
            )
        return value

    def section(self, name: str, names: tuple[str, ...]) -> "Fields":
        """An object with these fields."""
        return Fields(
            self.path,
            f"{self.where}.{name}" if self.where else name,
            value=self._values[name],
            names=names,
        )


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        # printing one of thousands of digits is an error of its own
        return "a number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
