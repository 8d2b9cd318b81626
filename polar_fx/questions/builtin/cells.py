"""What built-in tasks are made of: cells of numbered rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A question before it has a task: `key` says in a few characters which one it is."""

    key: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows by number: `make` on every combination of one number from each of `ranges`; None is no
    row.
    """

    ranges: tuple[range, ...]
    make: Callable[..., Row | None]

    @property
    def size(self) -> int:
        """How many combinations there are; at least as many as rows."""
        return math.prod(len(r) for r in self.ranges)

    def row(self, index: int) -> Row | None:
        """The row of combination `index`."""
        numbers: list[int] = []
        for r in reversed(self.ranges):
            index, at = divmod(index, len(r))
            numbers.append(r[at])
        return self.make(*reversed(numbers))


@dataclass(frozen=True, slots=True)
class Cell:
    """Rows of one kind, drawn from its pools in turn."""

    name: str
    pools: tuple[Pool, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A built-in task. `examples` are for few-shot prompts and never asked."""

    name: str
    cells: tuple[Cell, ...]
    examples: tuple[Row, ...]
