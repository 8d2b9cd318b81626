"""The order in which rows of different programs meet: one sequence of layers that holds every
program.

Each layer call of the sequence serves all rows whose next step it is. A shorter sequence has fewer
calls, each of more rows, and reads weights less often.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..program import Program

Path = tuple[int, ...]


@dataclass(frozen=True)
class LayerCall:
    """One call: `layer`, and which step of its program each of `rows` makes there."""

    layer: int
    rows: tuple[int, ...]
    steps: tuple[int, ...]


def shortest_with(first: Path, second: Path) -> Path:
    """A shortest sequence that holds both paths in order (their shortest common supersequence)."""
    n, m = len(first), len(second)
    # left[i][j]: length of a shortest sequence for first[i:] and second[j:]
    left = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n, -1, -1):
        for j in range(m, -1, -1):
            if i == n or j == m:
                left[i][j] = n - i + m - j
            elif first[i] == second[j]:
                left[i][j] = 1 + left[i + 1][j + 1]
            else:
                left[i][j] = 1 + min(left[i + 1][j], left[i][j + 1])
    merged, i, j = [], 0, 0
    while i < n and j < m:
        if first[i] == second[j]:
            merged.append(first[i])
            i, j = i + 1, j + 1
        elif left[i + 1][j] < left[i][j + 1] or (
            left[i + 1][j] == left[i][j + 1] and first[i] < second[j]
        ):
            merged.append(first[i])
            i += 1
        else:
            merged.append(second[j])
            j += 1
    return (*merged, *first[i:], *second[j:])


def union_path(paths: Sequence[Path]) -> Path:
    """A short sequence of layers that holds every path in order.

    Paths are merged one after another, the longest first; for two of them that is optimal.
    """
    return _union_of(frozenset(paths))


@functools.lru_cache(maxsize=1024)
def _union_of(paths: frozenset[Path]) -> Path:
    distinct = sorted(paths, key=lambda path: (-len(path), path))
    union = distinct[0]
    for path in distinct[1:]:
        union = shortest_with(union, path)
    return union


def lockstep_calls(
    programs: Sequence[Program], done: int = 0, *, stop: int | None = None
) -> tuple[LayerCall, ...]:
    """The layer calls that run steps `done` to `stop - 1` of every row's program (default: all),
    each step at the first call that fits.
    """
    paths = [p.path[done:stop] for p in programs]
    made = [0] * len(programs)
    calls = []
    for layer in union_path(paths):
        rows = []
        for row, path in enumerate(paths):
            if made[row] < len(path) and path[made[row]] == layer:
                rows.append(row)
        if not rows:
            continue
        calls.append(LayerCall(layer, tuple(rows), tuple(done + made[row] for row in rows)))
        for row in rows:
            made[row] += 1
    return tuple(calls)
