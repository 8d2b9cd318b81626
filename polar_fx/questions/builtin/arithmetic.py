"""Addition, subtraction, multiplication and exact division; cells by the digits of both numbers."""

from collections.abc import Callable

from .cells import Cell, Pool, Row, Task


def _digits(count: int, least: int) -> range:
    return range(max(least, 10 ** (count - 1)), 10**count)


def _add(a: int, b: int) -> Row:
    return Row(f"{a}+{b}", f"{a} + {b}", str(a + b))


def _subtract(a: int, b: int) -> Row | None:
    return Row(f"{a}-{b}", f"{a} - {b}", str(a - b)) if a >= b else None


def _multiply(a: int, b: int) -> Row:
    return Row(f"{a}x{b}", f"{a} * {b}", str(a * b))


def _divide(a: int, b: int) -> Row | None:
    return Row(f"{a}/{b}", f"{a} / {b}", str(a // b)) if a % b == 0 and a > b else None


def _cells(
    sign: str, make: Callable[[int, int], Row | None], *, digits: str, least: int = 1
) -> tuple[Cell, ...]:
    pairs = [(int(d[0]), int(d[1])) for d in digits.split()]
    return tuple(
        Cell(f"{a}{sign}{b} digits", (Pool((_digits(a, least), _digits(b, least)), make),))
        for a, b in pairs
    )


def _examples(make: Callable[[int, int], Row | None], *pairs: tuple[int, int]) -> tuple[Row, ...]:
    return tuple(row for a, b in pairs if (row := make(a, b)))


ADDITION = Task(
    "addition",
    _cells("+", _add, digits="11 21 22 32 33"),
    _examples(_add, (6, 3), (57, 8), (24, 35), (418, 67)),
)
SUBTRACTION = Task(
    "subtraction",
    _cells("-", _subtract, digits="11 21 22 32 33"),
    _examples(_subtract, (9, 4), (62, 7), (85, 31), (346, 58)),
)
# a factor of 1 asks for nothing
MULTIPLICATION = Task(
    "multiplication",
    _cells("x", _multiply, digits="11 21 31 22", least=2),
    _examples(_multiply, (3, 4), (8, 5), (21, 6), (13, 12)),
)
DIVISION = Task(
    "division",
    _cells("/", _divide, digits="21 22 31 32", least=2),
    _examples(_divide, (8, 2), (54, 6), (84, 21), (135, 5)),
)
