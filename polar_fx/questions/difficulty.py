"""Difficulty from what the unchanged model fails, as DART-Math does: by measured fail rate, not by
how hard a row looks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import InputError
from .question import Question


def levels(results: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Level by cell, from how many of how many questions were answered right: 1 up to 20 % failed,
    2 up to 40 % ... 5 above 80 %.

    Raises InputError for counts that cannot be.
    """
    found = {}
    for cell, (right, n) in results.items():
        if n < 1 or not 0 <= right <= n:
            raise InputError(
                f"cell {cell!r} has {right} right answers of {n}; measure at least one question, "
                "and count again"
            )
        # rounded up, in whole numbers: 20 % sharp is level 1
        found[cell] = max(1, -(-5 * (n - right) // n))
    return found


def with_difficulty(questions: Iterable[Question], levels: Mapping[str, int]) -> list[Question]:
    """The questions, each with the level of its cell. Raises InputError for a cell without one."""
    found = []
    for question in questions:
        if question.cell not in levels:
            raise InputError(
                f"question {question.id!r} is of the cell {question.cell!r}, which has no level; "
                f"measure it too, or leave it out (known: {', '.join(map(repr, levels)) or 'none'})"
            )
        found.append(replace(question, difficulty=levels[question.cell]))
    return found
