"""How many questions a short menu of programs gets right: the best K programs of some questions,
tried on others.

A menu's coverage is an oracle as well: a question is covered if any program of the menu is right,
which only the answer key tells. It is known in part: a search looks at some programs of a question,
and what it did not look at counts as wrong, so every coverage here is a lower bound. `undecided`
tells how loose it is: the uncovered questions for which some program of the menu was not explored.
Where all were (records of a run of the menu itself, or of a scan), it is 0 and coverage exact.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from ...program import Program
from ...questions import split_of
from ...stats.intervals import Share
from ..records.records import SearchRecord


@dataclass(frozen=True, slots=True)
class RankedMenu:
    """Programs, the most useful first, and how many further questions each covers of those it was
    ranked on.

    With `with_identity`, the identity is tried beside them, and not counted among them.
    """

    programs: tuple[Program, ...]
    gains: tuple[int, ...]
    with_identity: bool


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of `n` questions, how many the first K programs of a menu cover, and leave undecided; K is
    the index, from 0.

    A menu shorter than K covers what all of it covers.
    """

    n: int
    covered: tuple[int, ...]
    undecided: tuple[int, ...]

    def at(self, k: int) -> dict[str, Any]:
        """The share that is covered (see `Share.to_dict`), and how many are undecided."""
        k = min(k, len(self.covered) - 1)
        return {**Share(self.covered[k], self.n).to_dict(), "undecided": self.undecided[k]}


def greedy_menu(records: Sequence[SearchRecord], size: int, *, with_identity: bool) -> RankedMenu:
    """Up to `size` programs, each the one that covers most questions that those before it do not
    (greedy maximum coverage).

    Of equals, the one valid for more questions, then the shorter one. Ends early when no program
    covers a further question.
    """
    valid: dict[Program, list[int]] = {}
    for index, record in enumerate(records):
        for program in record.valid:
            valid.setdefault(program, []).append(index)
    # In order of preference, because argmax takes the first of equals.
    programs = sorted(valid, key=lambda p: (-len(valid[p]), p.num_steps, str(p)))
    programs_of: list[list[int]] = [[] for _ in records]
    for number, program in enumerate(programs):
        for index in valid[program]:
            programs_of[index].append(number)
    left = np.array([len(valid[p]) for p in programs], dtype=np.int64)
    covered = [with_identity and record.identity_correct for record in records]
    for index, done in enumerate(covered):
        if done:
            left[programs_of[index]] -= 1
    chosen: list[int] = []
    gains: list[int] = []
    while len(chosen) < size and len(left) and (gain := int(left.max())) > 0:
        best = int(left.argmax())
        chosen.append(best)
        gains.append(gain)
        for index in valid[programs[best]]:
            # each question is taken out once, so all steps together cost what the verdicts cost
            if not covered[index]:
                covered[index] = True
                left[programs_of[index]] -= 1
    return RankedMenu(tuple(programs[i] for i in chosen), tuple(gains), with_identity)


def coverage(menu: RankedMenu, records: Sequence[SearchRecord]) -> Coverage:
    """What the menu covers of these questions, as far as they explored its programs."""
    size = len(menu.programs)
    newly_covered = [0] * (size + 1)
    newly_undecided = [0] * (size + 1)
    for record in records:
        verdicts = {each.program: each.verdict.correct for each in record.explored}
        known = [verdicts.get(program) for program in menu.programs]
        hit = known.index(True) + 1 if True in known else size + 1
        if menu.with_identity and record.identity_correct:
            hit = 0
        unknown = known.index(None) + 1 if None in known else size + 1
        if hit <= size:
            newly_covered[hit] += 1
        if unknown < hit:
            newly_undecided[unknown] += 1
            if hit <= size:
                newly_undecided[hit] -= 1
    return Coverage(
        len(records), tuple(accumulate(newly_covered)), tuple(accumulate(newly_undecided))
    )


def merge(records: Iterable[SearchRecord]) -> list[SearchRecord]:
    """One record a question, of all that was explored; of a program in several, the first record's
    verdicts count.
    """
    merged: dict[tuple[str, str], SearchRecord] = {}
    for record in records:
        first = merged.setdefault(key(record), record)
        if first is not record:
            known = {each.program for each in first.explored}
            added = tuple(each for each in record.explored if each.program not in known)
            again = {
                each.program: record.verified[each.program]
                for each in added
                if each.program in record.verified
            }
            merged[key(record)] = replace(
                first, explored=first.explored + added, verified={**first.verified, **again}
            )
    return list(merged.values())


def key(record: SearchRecord) -> tuple[str, str]:
    """What tells questions of several files apart."""
    return record.question.task, record.question.id


def split_records(
    records: Sequence[SearchRecord],
) -> tuple[list[SearchRecord], list[SearchRecord], str]:
    """(train, held out, how): by the questions' own splits ("splits") if there are train and other
    ones, else "halves".

    Halves are by a hash of the id in which, as in `split_of`, the order of its numbers does not
    count.
    """
    is_train = [split_of(record.question.id) == "train" for record in records]
    how = "splits"
    if not (any(is_train) and not all(is_train)):
        is_train, how = [_in_first_half(record.question.id) for record in records], "halves"
    train: list[SearchRecord] = []
    held_out: list[SearchRecord] = []
    for record, trains in zip(records, is_train, strict=True):
        (train if trains else held_out).append(record)
    return train, held_out, how


def _in_first_half(question_id: str) -> bool:
    numbers = iter(sorted(re.findall(r"\d+", question_id)))
    text = "half of " + re.sub(r"\d+", lambda _: next(numbers), question_id)
    return hashlib.sha256(text.encode(errors="backslashreplace")).digest()[0] < 128


def menu_report(
    train: Sequence[SearchRecord], held_out: Sequence[SearchRecord], *, ks: Sequence[int]
) -> dict[str, Any]:
    """Menus of up to max(ks) programs ranked on `train`, with and without the identity, tried on
    both.

    {with_identity, without_identity}: {programs: [{program, gain}], at: [{k, in_sample, held_out}]
    of each K asked for,
    curve: {in_sample, held_out}: {n, covered, undecided}, counts by K from 0, ceiling: {in_sample,
    held_out}, the share of questions that any explored program covers}.
    """
    made: dict[str, Any] = {}
    for with_identity, name in ((True, "with_identity"), (False, "without_identity")):
        menu = greedy_menu(train, max(ks), with_identity=with_identity)
        ranked = [
            {"program": str(p), "gain": g} for p, g in zip(menu.programs, menu.gains, strict=True)
        ]
        at: list[dict[str, Any]] = [{"k": k} for k in ks]
        curves, ceilings = {}, {}
        for part, records in (("in_sample", train), ("held_out", held_out)):
            curve = coverage(menu, records)
            for row in at:
                row[part] = curve.at(row["k"])
            curves[part] = {
                "n": curve.n,
                "covered": list(curve.covered),
                "undecided": list(curve.undecided),
            }
            ceilings[part] = Share.of(
                bool(r.valid) or (with_identity and r.identity_correct) for r in records
            ).to_dict()
        made[name] = {"programs": ranked, "at": at, "curve": curves, "ceiling": ceilings}
    return made
