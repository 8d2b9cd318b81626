"""The edits in programs, and what each does on its own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from ...errors import NotSegmentableError
from ...program import Op, Program, Segment
from ...stats.intervals import mean
from ..records.records import SearchRecord


@lru_cache(maxsize=1 << 16)  # most programs occur for many questions, and in several groups of them
def edits_of(program: Program) -> tuple[Segment, ...] | None:
    """The fewest segments that skip or repeat, which make the program of the identity; None if no
    segments do.
    """
    try:
        return tuple(segment for segment in program.segments() if segment.op is not Op.KEEP)
    except NotSegmentableError:
        return None


@dataclass(frozen=True, slots=True)
class EditEffect:
    """What one edit, alone in the identity, changed over the `n` questions that explored exactly
    it.

    `correct` is the mean change of correctness, -1 to 1; `log_likelihood` that of the
    log-likelihood, in nats, over the `n_log_likelihood` questions where both are known and finite
    (None of none). A skip has times 1.
    """

    op: str
    start: int
    length: int
    times: int
    damping: float
    n: int
    correct: float
    n_log_likelihood: int
    log_likelihood: float | None


@dataclass(slots=True)
class _Changes:
    correct: list[int] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)


def edit_effects(records: Iterable[SearchRecord]) -> list[EditEffect]:
    """The effect of every single edit that some question explored: skips first, then repeats by
    times, length and start.
    """
    found: dict[Segment, _Changes] = {}
    for record in records:
        for each in record.explored:
            edits = edits_of(each.program)
            if edits is None or len(edits) != 1:
                continue
            changes = found.setdefault(edits[0], _Changes())
            changes.correct.append(int(each.verdict.correct) - int(record.baseline.correct))
            before, after = record.baseline.log_likelihood, each.verdict.log_likelihood
            # One infinite change would hide all others.
            if (
                before is not None
                and after is not None
                and math.isfinite(before)
                and math.isfinite(after)
            ):
                changes.log_likelihood.append(after - before)
    effects = [
        EditEffect(
            str(edit.op),
            edit.start,
            edit.num_layers,
            edit.times,
            edit.damping,
            len(changes.correct),
            mean(changes.correct) or 0.0,
            len(changes.log_likelihood),
            mean(changes.log_likelihood),
        )
        for edit, changes in found.items()
    ]
    return sorted(effects, key=lambda e: (e.op != Op.SKIP, e.times, -e.damping, e.length, e.start))
