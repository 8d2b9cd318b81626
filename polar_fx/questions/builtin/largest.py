"""The largest of a few numbers; cells by how many there are and their digits."""

from .cells import Cell, Pool, Row, Task


def _largest(*numbers: int) -> Row | None:
    if len(set(numbers)) < len(numbers):
        return None
    return Row(
        ",".join(map(str, numbers)), f"max({', '.join(map(str, numbers))})", str(max(numbers))
    )


def _cell(count: int, digits: int) -> Cell:
    numbers = range(10 ** (digits - 1), 10**digits)
    return Cell(
        f"{count} of {digits} digit{'s' if digits > 1 else ''}",
        (Pool((numbers,) * count, _largest),),
    )


COMPARISON = Task(
    "comparison",
    (_cell(2, 1), _cell(3, 1), _cell(2, 2), _cell(2, 3), _cell(3, 2)),
    tuple(
        row
        for row in (_largest(4, 7), _largest(62, 35), _largest(128, 415, 390), _largest(9, 3))
        if row
    ),
)
