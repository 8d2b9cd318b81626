"""Which number comes next; cells by the rule."""

from collections.abc import Callable

from .cells import Cell, Pool, Row, Task


def _row(*terms: int) -> Row:
    *shown, last = terms
    text = ", ".join(map(str, shown))
    return Row(text.replace(" ", ""), f"Which number comes next: {text}", str(last))


def _constant_step(start: int, step: int) -> Row:
    return _row(*(start + step * i for i in range(6)))


def _falling(end: int, step: int) -> Row:
    return _row(*(end + step * (5 - i) for i in range(6)))


def _growing_step(start: int, step: int, growth: int) -> Row:
    return _row(*(start + step * i + growth * i * (i - 1) // 2 for i in range(6)))


def _multiplied(start: int, factor: int) -> Row:
    return _row(*(start * factor**i for i in range(5)))


def _repeating(a: int, b: int, c: int) -> Row | None:
    return _row(a, b, c, a, b, c, a, b) if len({a, b, c}) == 3 else None


def _cell(name: str, make: Callable[..., Row | None], *ranges: range) -> Cell:
    return Cell(name, (Pool(ranges, make),))


SEQUENCES = Task(
    "sequences",
    (
        _cell("repeating", _repeating, range(1, 21), range(1, 21), range(1, 21)),
        _cell("small step", _constant_step, range(1, 61), range(2, 10)),
        _cell("large step", _constant_step, range(1, 100), range(11, 40)),
        _cell("falling", _falling, range(61), range(2, 10)),
        _cell("growing step", _growing_step, range(1, 41), range(1, 10), range(1, 4)),
        _cell("multiplied", _multiplied, range(1, 41), range(2, 6)),
    ),
    (_row(4, 9, 2, 4, 9, 2, 4, 9), _constant_step(3, 4), _falling(10, 6), _multiplied(3, 2)),
)
