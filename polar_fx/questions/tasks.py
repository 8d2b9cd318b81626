"""The built-in tasks: questions made from a seed, with short answers that can be checked exactly.

What a row is depends only on its numbers: its id names them, and wording that varies (names,
things, phrases) is drawn by a hash of the id. So no two rows differ in wording alone, and the
split, a hash of the id, keeps near copies together.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar, get_args

from ..errors import InputError
from .builtin.arithmetic import ADDITION, DIVISION, MULTIPLICATION, SUBTRACTION
from .builtin.cells import Cell, Pool, Row, Task
from .builtin.largest import COMPARISON
from .builtin.sequences import SEQUENCES
from .builtin.word_problems import WORD_PROBLEMS
from .question import Question, Split

T = TypeVar("T")

TASKS: dict[str, Task] = {
    t.name: t
    for t in (ADDITION, SUBTRACTION, MULTIPLICATION, WORD_PROBLEMS, SEQUENCES, DIVISION, COMPARISON)
}

_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.60), ("validation", 0.15), ("test", 0.25))


def get_task(name: str) -> Task:
    """A built-in task by name. Raises InputError naming the known ones."""
    if name not in TASKS:
        raise InputError(
            f"unknown task {name!r}; use one of {', '.join(TASKS)}, or load questions from a file"
        )
    return TASKS[name]


def split_of(question_id: str) -> Split:
    """The split a question belongs to, whatever task, seed or file it came from: 60 % train, 15 %
    validation, 25 % test.

    Ids that hold the same numbers in another order (7x8, 8x7) are in one split.
    """
    numbers = iter(sorted(re.findall(r"\d+", question_id)))
    key = re.sub(r"\d+", lambda _: next(numbers), question_id)
    at = (
        int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "big")
        / 2**64
    )
    for name, share in _SHARES:
        if at < share:
            return name
        at -= share
    return "test"


def generate(
    task: str, n: int, seed: int = 0, cells: Sequence[str] | None = None, split: Split | None = None
) -> list[Question]:
    """`n` different questions of a built-in task, as many of each cell as there are, cells in turn.

    The same arguments give the same rows; fewer rows are the first of more, and a cell's rows do
    not depend on the other cells. The examples of the few-shot prompts are never among them. Raises
    InputError for an unknown task, cell or split, and when fewer than `n` exist.
    """
    made = get_task(task)
    chosen = _chosen(made, cells)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n is {n!r}; ask for a whole number of questions, at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed is {seed!r}; give a whole number")
    if split is not None and split not in get_args(Split):
        raise InputError(
            f"unknown split {split!r}; use one of {', '.join(get_args(Split))}, or None for all"
        )
    rows = list(islice(_in_turn([_rows(made, cell, seed=seed, split=split) for cell in chosen]), n))
    if len(rows) == n:
        return rows
    where = f" in the {split} split" if split else ""
    names = "" if cells is None else f" with the cells {', '.join(c.name for c in chosen)}"
    raise InputError(
        f"{n} questions asked of {task}{names}, but {len(rows)} exist{where}; ask for fewer, or "
        "add cells"
    )


def cell_sample(
    task: str, cell: str, *, n: int, seed: int = 0, split: Split | None = None
) -> list[Question]:
    """`n` different questions of one cell, or as many as there are.

    Raises InputError for an unknown task or cell.
    """
    made = get_task(task)
    (chosen,) = _chosen(made, [cell])
    return list(islice(_rows(made, chosen, seed=seed, split=split), n))


def _chosen(task: Task, cells: Sequence[str] | None) -> list[Cell]:
    if cells is None:
        return list(task.cells)
    names = [c.name for c in task.cells]
    wanted = [cells] if isinstance(cells, str) else list(cells)
    if not wanted:
        raise InputError(
            f"no cells of {task.name} were named; use some of {', '.join(names)}, or None for all"
        )
    for name in wanted:
        if name not in names:
            raise InputError(
                f"unknown cell {name!r} of {task.name}; use some of {', '.join(names)}"
            )
    return [c for c in task.cells if c.name in wanted]


def _rows(task: Task, cell: Cell, *, seed: int, split: Split | None) -> Iterator[Question]:
    """All rows of a cell in an order drawn from the seed."""
    held_out = {example.key for example in task.examples}
    rng = random.Random(f"{seed}:{task.name}:{cell.name}")
    for row in _in_turn([_drawn(pool, rng.random()) for pool in cell.pools]):
        question_id = f"{task.name}:{row.key}"
        if (split is None or split_of(question_id) == split) and row.key not in held_out:
            yield Question(question_id, task.name, row.question, (row.answer,), cell=cell.name)


def _drawn(pool: Pool, seed: float) -> Iterator[Row]:
    for index in _shuffled(pool.size, random.Random(seed)):
        row = pool.row(index)
        if row is not None:
            yield row


def _in_turn(sources: list[Iterator[T]]) -> Iterator[T]:
    """One of each source, again and again, without those that ran dry."""
    while sources:
        running = []
        for source in sources:
            for row in islice(source, 1):
                yield row
                running.append(source)
        sources = running


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """range(size) in random order, without holding all of it (Fisher-Yates on a sparse array)."""
    moved: dict[int, int] = {}
    for i in range(size):
        # random() is the one method whose values Python promises to keep between versions
        j = i + int(rng.random() * (size - i))
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)
