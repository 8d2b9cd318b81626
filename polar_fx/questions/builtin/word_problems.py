"""Short stories about counts, of one to three steps; cells by the number of steps.

A kind of story is its calculation with several wordings. Which wording, name and thing a row gets
is a hash of its key.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from .cells import Cell, Pool, Row, Task

_NAMES = ("Mia", "Tom", "Ava", "Ben", "Lily", "Sam", "Nora", "Leo", "Ruth", "Omar", "Ines", "Jack")
_THINGS = (
    "apples",
    "books",
    "coins",
    "pencils",
    "stickers",
    "marbles",
    "shells",
    "cards",
    "cookies",
    "stamps",
    "beads",
    "balloons",
)


@dataclass(frozen=True, slots=True)
class _Story:
    """`answer` of the numbers a, b, ... of `ranges`; negative or None: the story does not work out
    with them.
    """

    kind: str
    ranges: tuple[range, ...]
    answer: Callable[..., int | None]
    wordings: tuple[str, ...]

    def row(self, *numbers: int) -> Row | None:
        answer = self.answer(*numbers)
        if answer is None or answer < 0:
            return None
        key = f"{self.kind}:{','.join(map(str, numbers))}"
        digest = hashlib.sha256(key.encode()).digest()
        text = self.wordings[digest[0] % len(self.wordings)].format(
            N=_NAMES[digest[1] % len(_NAMES)],
            M=_NAMES[(digest[1] + 1 + digest[2] % (len(_NAMES) - 1)) % len(_NAMES)],  # another one
            T=_THINGS[digest[3] % len(_THINGS)],
            **dict(zip("abcd", numbers, strict=False)),
        )
        return Row(key, text, str(answer))


def _exactly(a: int, b: int) -> int | None:
    return a // b if a % b == 0 else None


_ONE_STEP = (
    _Story(
        "more",
        (range(2, 60), range(2, 40)),
        lambda a, b: a + b,
        (
            "{N} has {a} {T}. {M} gives {N} {b} more {T}. How many {T} does {N} have now?",
            "There are {a} {T} in a box. {N} puts in {b} more. How many {T} are in the box?",
            "{N} found {a} {T} on Monday and {b} on Tuesday. How many {T} did {N} find in all?",
        ),
    ),
    _Story(
        "fewer",
        (range(5, 80), range(2, 40)),
        lambda a, b: a - b,
        (
            "{N} has {a} {T} and gives {b} of them to {M}. How many {T} does {N} have left?",
            "There were {a} {T} on a table. {N} took {b} away. How many {T} are still on the "
            "table?",
            "{N} has {a} {T} and {M} has {b}. How many more {T} than {M} does {N} have?",
        ),
    ),
    _Story(
        "groups",
        (range(2, 13), range(2, 13)),
        lambda a, b: a * b,
        (
            "{N} has {a} bags with {b} {T} in each bag. How many {T} does {N} have?",
            "Each of {a} children brings {b} {T}. How many {T} do they bring in all?",
            "{N} puts {b} {T} in each of {a} rows. How many {T} does {N} put down?",
        ),
    ),
    _Story(
        "share",
        (range(4, 121), range(2, 13)),
        _exactly,
        (
            "{N} shares {a} {T} equally among {b} friends. How many {T} does each friend get?",
            "{a} {T} are packed into {b} boxes, the same number in each. How many {T} are in one "
            "box?",
        ),
    ),
)

_TWO_STEPS = (
    _Story(
        "more-fewer",
        (range(5, 50), range(2, 30), range(2, 30)),
        lambda a, b, c: a + b - c,
        (
            "{N} has {a} {T}, gets {b} more and then gives {c} to {M}. How many {T} does {N} have "
            "now?",
            "A bus carries {a} people. At a stop {b} people get on and {c} get off. How many "
            "people are on the bus?",
        ),
    ),
    _Story(
        "groups-more",
        (range(2, 10), range(2, 13), range(2, 30)),
        lambda a, b, c: a * b + c,
        (
            "{N} has {a} bags of {b} {T} and {c} loose {T}. How many {T} does {N} have in all?",
            "{N} buys {a} packs of {b} {T}. {N} had {c} {T} before. How many {T} does {N} have "
            "now?",
        ),
    ),
    _Story(
        "groups-fewer",
        (range(2, 10), range(2, 13), range(2, 30)),
        lambda a, b, c: a * b - c,
        (
            "{N} fills {a} boxes with {b} {T} each and then sells {c} {T}. How many {T} are left?",
            "There are {a} rows of {b} chairs, and {c} chairs are taken. How many chairs are free?",
        ),
    ),
    _Story(
        "add-share",
        (range(2, 50), range(2, 50), range(2, 10)),
        lambda a, b, c: _exactly(a + b, c),
        (
            "{N} has {a} {T} and {M} has {b}. They put them together and share them equally among "
            "{c} children. How many {T} does each child get?",
            "{N} baked {a} buns in the morning and {b} at noon, and packs {c} in a bag. How many "
            "bags does {N} fill?",
        ),
    ),
)

_THREE_STEPS = (
    _Story(
        "two-groups-fewer",
        (range(2, 8), range(2, 10), range(2, 8), range(2, 20)),
        lambda a, b, c, d: a * b + c - d,
        (
            "{N} buys {a} packs of {b} {T}, gets {c} more from {M} and loses {d}. How many {T} "
            "does {N} have?",
            "{N} picks {b} pears from each of {a} trees and {c} from the ground. {N} eats {d}. "
            "How many pears are left?",
        ),
    ),
    _Story(
        "costs",
        (range(2, 8), range(2, 10), range(2, 8), range(2, 10)),
        lambda a, b, c, d: a * b + c * d,
        (
            "{N} buys {a} pens for {b} dollars each and {c} cups for {d} dollars each. How many "
            "dollars does {N} pay?",
            "{N} has {a} bags of {b} {T} and {M} has {c} bags of {d} {T}. How many {T} do they "
            "have together?",
        ),
    ),
    _Story(
        "change",
        (range(2, 7), range(2, 10), range(2, 10), (range(20, 101, 10))),
        lambda a, b, c, d: d - a * (b + c),
        (
            "A ticket costs {b} dollars and a drink {c} dollars. {N} buys {a} of each and pays "
            "with {d} dollars. How many dollars does {N} get back?",
            "{N} has {d} {T}. Each of {a} friends takes {b} {T} and later {c} more. How many {T} "
            "does {N} have left?",
        ),
    ),
    _Story(
        "left-share",
        (range(10, 80), range(2, 20), range(2, 20), range(2, 8)),
        lambda a, b, c, d: _exactly(a + b - c, d),
        (
            "{N} has {a} {T}, finds {b} more, gives {c} away and shares the rest equally among "
            "{d} friends. How many {T} does each friend get?",
            "A club of {a} members gains {b} and loses {c}. The members form {d} equal teams. How "
            "many are in a team?",
        ),
    ),
)


def _cell(name: str, stories: tuple[_Story, ...]) -> Cell:
    return Cell(name, tuple(Pool(s.ranges, s.row) for s in stories))


def _examples(*rows: Row | None) -> tuple[Row, ...]:
    return tuple(row for row in rows if row)


WORD_PROBLEMS = Task(
    "word-problems",
    (_cell("1 step", _ONE_STEP), _cell("2 steps", _TWO_STEPS), _cell("3 steps", _THREE_STEPS)),
    _examples(
        _ONE_STEP[0].row(7, 5),
        _ONE_STEP[3].row(24, 4),
        _TWO_STEPS[2].row(3, 8, 6),
        _THREE_STEPS[0].row(2, 6, 5, 4),
    ),
)
