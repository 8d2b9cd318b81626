"""The small values a program is made of: ops, segments, edits, blends and steps.

Every value checks itself when built, so code that holds one never checks again.
"""

# Callers who run no type checker are told what is wrong.
# pyright: reportUnnecessaryIsInstance=false

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import SupportsIndex

from ..errors import ProgramError

MAX_STEPS = 4096
"""Most steps a program may run, and most layers it may address. Checked before anything is laid
out, so a typing mistake such as `(0)*999999999` costs an error, not the machine's memory.
"""


class Op(StrEnum):
    """What a segment does with its layers: skip them, run them once, or run them several times."""

    SKIP = "skip"
    KEEP = "keep"
    REPEAT = "repeat"


def check_whole(value: SupportsIndex, what: str, *, low: int, high: int | None = None) -> int:
    """Return `value` as an int; raise ProgramError for bools, floats and values outside
    low..high.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise ProgramError(f"{what} is {value!r} ({kind}); give a whole number (int)") from None
    if number < low or (high is not None and number > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ProgramError(f"{what} is {number}; give a whole number {bounds}")
    return number


def check_depth(depth: SupportsIndex) -> int:
    """Return `depth` as an int; raise ProgramError unless it is 1..MAX_STEPS."""
    return check_whole(depth, "depth (the model's number of layers)", low=1, high=MAX_STEPS)


def check_damping(damping: float, what: str) -> float:
    """Return `damping` as a float; raise ProgramError unless it lies in (0, 1]."""
    if isinstance(damping, bool) or not isinstance(damping, Real) or not 0 < float(damping) <= 1:
        raise ProgramError(
            f"damping of {what} is {damping!r}; give a number above 0 and at most 1 (1 = undamped)"
        )
    return float(damping)


def check_op(op: Op | str, where: str) -> Op:
    """Return `op` as an Op; raise ProgramError naming the known ones."""
    try:
        return Op(op)
    except ValueError:
        raise ProgramError(f"op of {where} is {op!r}; use one of {', '.join(Op)}") from None


def check_num_steps(num_steps: int, what: str) -> None:
    """Raise ProgramError if a program would run more than MAX_STEPS steps."""
    if num_steps > MAX_STEPS:
        raise ProgramError(
            f"{what} would run {num_steps} steps, the limit is {MAX_STEPS}; repeat less"
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers start..stop-1 of the original order with one op (PoLar's unit of a program).

    `times` counts all executions of a repeat. With `damping` a < 1 the first pass is plain and
    every further pass is h <- h + a * (segment(h) - h). Raises ProgramError on bad fields.
    """

    start: int
    stop: int
    op: Op = Op.KEEP
    times: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        start = check_whole(self.start, "segment start", low=0)
        stop = check_whole(
            self.stop,
            f"stop (exclusive) of the segment that starts at layer {start}",
            low=start + 1,
        )
        where = f"segment {start}:{stop}"
        op = check_op(self.op, where)
        times = check_whole(self.times, f"times of {where}", low=1)
        damping = check_damping(self.damping, where)
        if op is Op.REPEAT and times < 2:
            raise ProgramError(
                f"{where} repeats with times={times}; times counts all runs: give 2 or more"
            )
        if op is not Op.REPEAT and (times, damping) != (1, 1.0):
            raise ProgramError(
                f"{where} has op {op} with times={times}, damping={damping}; only a repeat takes "
                "them"
            )
        _set(self, start=start, stop=stop, op=op, times=times, damping=damping)

    def __str__(self) -> str:
        """`keep 0-4`, `skip 5` or `repeat 10-11 x3 @0.5`; both ends of a range count."""
        last = self.stop - 1
        layers = str(last) if self.num_layers == 1 else f"{self.start}-{last}"
        times = f" x{self.times}" if self.op is Op.REPEAT else ""
        damping = f" @{self.damping!r}" if self.damping != 1.0 else ""
        return f"{self.op} {layers}{times}{damping}"

    @property
    def num_layers(self) -> int:
        """Number of layers the segment covers."""
        return self.stop - self.start

    @property
    def num_steps(self) -> int:
        """Number of steps the segment runs (0 for a skip)."""
        return 0 if self.op is Op.SKIP else self.num_layers * self.times


@dataclass(frozen=True, slots=True)
class Edit:
    """One skip or repeat of `length` layers from original layer `start`, over the identity.

    Edits do not nest, so sets of them commute and always parse back into segments (RE-PoLar's
    search space). Raises ProgramError on bad fields.
    """

    start: int
    length: int
    op: Op
    times: int = 2
    damping: float = 1.0

    def __post_init__(self) -> None:
        start = check_whole(self.start, "edit start", low=0)
        length = check_whole(self.length, f"length of the edit at layer {start}", low=1)
        where = f"edit of layers {start}:{start + length}"
        op = check_op(self.op, where)
        times = check_whole(self.times, f"times of {where}", low=2)
        damping = check_damping(self.damping, where)
        if op is Op.KEEP:
            raise ProgramError(f"{where} has op keep; leave the edit out, or use skip or repeat")
        if op is Op.SKIP and (times, damping) != (2, 1.0):
            raise ProgramError(
                f"{where} skips with times={times}, damping={damping}; leave both at their defaults"
            )
        _set(self, start=start, length=length, op=op, times=times, damping=damping)

    def to_segment(self) -> Segment:
        """Return the segment this edit makes of its layers."""
        times = self.times if self.op is Op.REPEAT else 1
        return Segment(self.start, self.start + self.length, self.op, times, self.damping)


@dataclass(frozen=True, slots=True)
class Blend:
    """Steps start..stop-1 damped: h_in + damping * (h_out - h_in), as in a damped repeat.

    h_in is the hidden state before step `start`, h_out the one after step stop-1. Raises
    ProgramError on bad fields.
    """

    start: int
    stop: int
    damping: float

    def __post_init__(self) -> None:
        start = check_whole(self.start, "blend start", low=0)
        stop = check_whole(
            self.stop, f"stop (exclusive) of the blend that starts at step {start}", low=start + 1
        )
        damping = check_damping(self.damping, f"the blend over steps {start}:{stop}")
        _set(self, start=start, stop=stop, damping=damping)


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a path, with the blends that start before it and end after it.

    Before the step, save the hidden state `opens` times (outer blends first). After it, for each
    damping in `closes` (innermost blend first), pop the last saved state s and set h = s + damping
    * (h - s).
    """

    index: int
    layer: int
    opens: int
    closes: tuple[float, ...]


def canonical_blends(blends: Iterable[Blend], num_steps: int) -> tuple[Blend, ...]:
    """Return blends sorted outer first, one per interval, without no-ops.

    Raises ProgramError if a blend reaches beyond the path or two blends overlap without nesting.
    """
    factors: dict[tuple[int, int], list[float]] = {}
    for blend in blends:
        if not isinstance(blend, Blend):
            raise ProgramError(f"blends holds {blend!r}; give Blend(start, stop, damping) values")
        if blend.stop > num_steps:
            raise ProgramError(
                f"blend over steps {blend.start}:{blend.stop} reaches beyond the last of "
                f"{num_steps} steps; blends count steps, not layers: give a stop of at most "
                f"{num_steps}"
            )
        factors.setdefault((blend.start, blend.stop), []).append(blend.damping)
    # Sorted factors make the rounded product independent of the order they were given in.
    merged = [
        Blend(start, stop, math.prod(sorted(each))) for (start, stop), each in factors.items()
    ]
    result = tuple(sorted((b for b in merged if b.damping < 1), key=lambda b: (b.start, -b.stop)))
    enclosing: list[Blend] = []
    for blend in result:
        while enclosing and enclosing[-1].stop <= blend.start:
            enclosing.pop()
        if enclosing and blend.stop > enclosing[-1].stop:
            outer = enclosing[-1]
            raise ProgramError(
                f"blends over steps {outer.start}:{outer.stop} and {blend.start}:{blend.stop} "
                "overlap; make them disjoint or nest one in the other"
            )
        enclosing.append(blend)
    return result


def _set(value: object, **fields: object) -> None:
    """Store checked fields on a frozen dataclass."""
    for name, field in fields.items():
        object.__setattr__(value, name, field)
