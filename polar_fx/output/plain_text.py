"""Plain text for terminals and logs: tables, sizes, ranges of numbers."""

from collections.abc import Iterable, Sequence


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()
) -> list[str]:
    """Lines of a table, two spaces between columns; those named in `right` are aligned to the
    right.
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_right = [name in set(right) for name in head]

    def line(row: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, to_right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return [line(cells[0]), rule, *map(line, cells[1:])]


def size(num_bytes: float) -> str:
    """`12.3 MB`."""
    for unit, each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= each:
            return f"{num_bytes / each:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def first_line(error: BaseException) -> str:
    """What an error says, cut after its first line; the name of its type if it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__


def dtype_name(dtype: object) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def count(number: int, what: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, as exact as an estimate may be."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 5` of [0, 1, 2, 3, 5], `0, 2 .. 8` of [0, 2, 4, 6, 8]; empty for none."""
    found: list[str] = []
    at = 0
    while at < len(numbers):
        first = numbers[at]
        step = numbers[at + 1] - first if at + 1 < len(numbers) else 0
        stop = at + 1
        while step > 0 and stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        if step > 1 and stop - at < 4:
            stop = at + 1  # too few to leave any out
        many = (
            f"{first}-{numbers[stop - 1]}"
            if step == 1
            else f"{first}, {first + step} .. {numbers[stop - 1]}"
        )
        found.append(str(first) if stop - at == 1 else many)
        at = stop
    return ", ".join(found)
