"""Mining a menu: from what a search found valid to the K programs that a selector can make most of.

A program that one question's search found may be right there by luck: the best of 100 useless
programs looks 7 points better on 250 questions. So candidates are tried again, all on the same
train questions, the best of each task on more of them, and the menu is chosen by three criteria:
questions a program adds to what the menu covers, how much better it is on a whole kind of question
(which a selector can learn; single questions mostly not), and what it saves.

Shape legend: N questions, K programs, G groups (task and cell).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import TypeVar

import numpy as np

from ..errors import ProgramError
from ..program import Edit, Op, Program, Segment
from ..runtime.trunk import shares_trunk
from ..search.records.records import SearchRecord
from .verdict_table import VerdictTable

T = TypeVar("T")

# fractions of the identity's steps with a program each of their own
BUDGETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)
_PRIOR = 30  # questions on which a program is taken for the identity, beside those it ran on
_FEW = 10  # the same for candidates of searches, which ran on few questions each
_LONG_SKIPS = ((6, 3), (9, 4), (12, 5), (15, 6))  # layers, and how far apart such skips begin
# what a question answered with no steps at all would count more than one answered with all
_STEP_WEIGHT = 0.25


def candidates(records: Iterable[SearchRecord], num_steps: int, *, count: int) -> list[Program]:
    """Up to `count` programs of the records that begin with the trunk of `num_steps` steps, most
    promising first.

    In turn: those valid for most questions, those that correct most wrong answers, the shortest
    that are right, and for each task those that beat the identity by most there, in right answers
    and, where both were scored, in log-likelihood (an answer that came closer tells more than one
    that is still wrong). Verified verdicts count where there are any.
    """
    valid: Counter[Program] = Counter()
    corrects: Counter[Program] = Counter()
    gains: dict[str, dict[Program, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        base = record.baseline
        for each in record.explored:
            program, verdict = each.program, record.verified.get(each.program, each.verdict)
            if not shares_trunk(program, num_steps):
                continue
            closer = 0.0
            if each.verdict.log_likelihood is not None and base.log_likelihood is not None:
                closer = math.exp(each.verdict.log_likelihood) - math.exp(base.log_likelihood)
            gains[record.question.task][program].append(verdict.correct - base.correct + closer)
            if verdict.correct and each.verdict.correct:
                valid[program] += 1
                corrects[program] += not base.correct
    orders = [
        sorted(valid, key=lambda p: (-valid[p], p.num_steps, str(p))),
        sorted(valid, key=lambda p: (-corrects[p], -valid[p], p.num_steps, str(p))),
        sorted(
            (p for p in valid if p.num_steps < p.depth),
            key=lambda p: (-valid[p] * (p.depth - p.num_steps), str(p)),
        ),
    ]
    for _, of_task in sorted(gains.items()):
        # as if it had been the identity on some questions more: one lucky question is no gain
        worth = {p: sum(g) / (len(g) + _FEW) for p, g in of_task.items()}
        orders.append(
            sorted((p for p in worth if p in valid), key=lambda p: (-worth[p], p.num_steps, str(p)))
        )
    return _first_of_each(orders, count)


def edits_as_programs(depth: int, num_steps: int) -> list[Program]:
    """Single edits behind the trunk, which need no search, the shortest first.

    Every skip of 1 to 3 layers, every repeat of 1 to 3, whole and at half strength, and some longer
    skips.
    """
    edits: list[Edit] = []
    for n in (1, 2, 3):
        starts = range(num_steps, depth - n + 1)
        edits += [Edit(s, n, Op.SKIP) for s in starts if n < depth]
        edits += [Edit(s, n, Op.REPEAT, 2, damping) for damping in (1.0, 0.5) for s in starts]
    edits += [
        Edit(s, n, Op.SKIP)
        for n, stride in _LONG_SKIPS
        if n < depth
        for s in range(num_steps, depth - n + 1, stride)
    ]
    programs = (Program.from_edits([edit], depth) for edit in edits)
    return [program for program in programs if shares_trunk(program, num_steps)]


def finalists(table: VerdictTable, count: int) -> list[Program]:
    """Up to `count` programs to try on more questions: in turn the best of each task, and the best
    within each of `BUDGETS`.

    Which are best is told by accuracy and, where that ties, likelihood.
    """
    orders = _best(table, table.tasks(), keep=len(table.programs))
    accuracy = table.right.mean(0)
    for fraction in BUDGETS:
        within = [
            k for k in range(1, len(accuracy)) if table.steps[k] <= fraction * table.depth + 1e-9
        ]
        orders.append(
            [
                table.programs[k]
                for k in sorted(within, key=lambda k: (-accuracy[k], table.steps[k], k))
            ]
        )
    return _first_of_each(orders, count)


def variations(
    table: VerdictTable, num_steps: int, *, count: int, damping: float = 0.5
) -> list[Program]:
    """Up to `count` new programs made of the best ones on the table: two of them at once, and
    repeats damped.

    Which are best is asked for each group, by accuracy and, where that ties, likelihood.
    """
    best = _best(table, table.groups(), keep=6)
    found: dict[Program, None] = {}
    for program in dict.fromkeys(p for order in best for p in order[:4]):
        if (other := _damped(program, damping)) is not None:
            found[other] = None
    pairs = sorted(
        (
            (a + b, order[a], order[b])
            for order in best
            for a in range(len(order))
            for b in range(a + 1, len(order))
        ),
        key=lambda pair: (pair[0], str(pair[1]), str(pair[2])),
    )
    for _, one, other in pairs:
        if (joined := _joined(one, other)) is not None:
            found[joined] = None
    known = set(table.programs)
    return [p for p in found if p not in known and shares_trunk(p, num_steps)][:count]


def mine(table: VerdictTable, size: int) -> list[Program]:
    """A menu of at most `size` programs, the identity first, chosen on the table's questions (train
    ones).

    In turn: the program that adds most to the coverage weighted by steps, the one that adds most to
    the mean over groups of the best program's accuracy (shrunk to what its gain is on the whole
    task, and that to none), and the most accurate within each of `BUDGETS`.
    """
    right = table.right.astype(np.float64)
    worth = right * (1 + _STEP_WEIGHT * (1 - table.steps / table.depth))
    groups = table.groups()
    by_group = _accuracy_by_group(right, groups, tasks=table.tasks())
    sizes = np.bincount(groups) / len(groups)
    within = [_within(right.mean(0), table.steps, limit=f * table.depth) for f in BUDGETS]
    criteria = (
        lambda chosen: _most_added(worth, chosen, total=lambda gains: gains.sum(0)),
        lambda chosen: _most_added(by_group, chosen, total=lambda gains: sizes @ gains),
        _one_by_one(within),
    )
    limit = min(size, len(table.programs))
    # each round adds a program or uses up a budget, or none to come would add anything
    chosen = in_turn(criteria, limit, rounds=size + len(BUDGETS), first=(0,))
    return [table.programs[k] for k in chosen]


def best_static(table: VerdictTable, max_steps: float | None = None) -> Program:
    """The one program right most often (of equals, the shorter) of at most `max_steps` steps; the
    identity if there is none.
    """
    allowed = np.ones(len(table.programs), bool) if max_steps is None else table.steps <= max_steps
    order = sorted(
        np.flatnonzero(allowed), key=lambda k: (-table.right[:, k].sum(), table.steps[k], k)
    )
    return table.programs[order[0]] if order else table.programs[0]


def in_turn(
    criteria: Sequence[Callable[[list[T]], T | None]],
    count: int,
    *,
    rounds: int,
    first: Sequence[T] = (),
) -> list[T]:
    """Up to `count` different things: those of `first`, then what each criterion names in turn.

    In each of the rounds every criterion is told what is chosen so far, and names one more; None,
    or one that is chosen already, and its turn is over.
    """
    chosen = dict.fromkeys(first)
    for criterion in chain.from_iterable(repeat(criteria, rounds)):
        if len(chosen) >= count:
            break
        if (named := criterion(list(chosen))) is not None:
            chosen.setdefault(named)
    return list(chosen)


def _first_of_each(orders: Sequence[Sequence[Program]], count: int) -> list[Program]:
    """Up to `count` programs: the first of each order, then the second of each, and so on."""
    longest = max(map(len, orders), default=0)
    return in_turn([_one_by_one(order) for order in orders], count, rounds=longest)


def _one_by_one(order: Iterable[T | None]) -> Callable[[list[T]], T | None]:
    """A criterion that names these in order, whatever is chosen."""
    left = iter(order)
    return lambda chosen: next(left, None)


def _most_added(
    values: np.ndarray, chosen: list[int], *, total: Callable[[np.ndarray], np.ndarray]
) -> int | None:
    """The column of `values` [N, K] that raises each row's maximum over the chosen ones by most in
    `total`, which takes [N, K] to [K]; None if none raises it.
    """
    left = np.setdiff1d(np.arange(values.shape[1]), chosen)
    reached = values[:, chosen].max(1, keepdims=True)
    gains = total(np.maximum(values[:, left] - reached, 0))
    return int(left[gains.argmax()]) if gains.max() > 0 else None


def _within(accuracy: np.ndarray, steps: np.ndarray, *, limit: float) -> int | None:
    allowed = steps <= limit + 1e-9
    return int(np.where(allowed, accuracy, -1).argmax()) if allowed.any() else None


def _accuracy_by_group(right: np.ndarray, groups: np.ndarray, *, tasks: np.ndarray) -> np.ndarray:
    """Accuracies [G, K] in each group, their gains over the identity shrunk to the task's, and
    those to none.
    """
    gains = right - right[:, :1]
    found = []
    for g in range(groups.max() + 1):
        of_group = groups == g
        of_task = tasks == tasks[of_group][0]
        found.append(
            right[of_group, 0].mean() + _shrunk(gains[of_group], _shrunk(gains[of_task], 0.0))
        )
    return np.stack(found)


def _shrunk(values: np.ndarray, towards: np.ndarray | float) -> np.ndarray:
    """Means [K] over rows, as if `_PRIOR` further rows had the values `towards`."""
    return (values.sum(0) + _PRIOR * np.asarray(towards)) / (len(values) + _PRIOR)


def _best(table: VerdictTable, groups: np.ndarray, *, keep: int) -> list[list[Program]]:
    """The best `keep` programs of each group, the identity left out."""
    likelihood = np.nan_to_num(np.exp(table.log_likelihood), nan=0.0)
    score = table.right + 0.5 * likelihood
    found = []
    for g in range(groups.max() + 1):
        order = np.argsort(-_shrunk((score - score[:, :1])[groups == g], 0.0), kind="stable")
        found.append([table.programs[k] for k in order if k][:keep])
    return found


def _damped(program: Program, damping: float) -> Program | None:
    try:
        segments = program.segments()
    except ProgramError:
        return None
    if not any(s.op is Op.REPEAT and s.damping == 1 for s in segments):
        return None
    return Program.from_segments(
        [replace(s, damping=damping) if s.op is Op.REPEAT else s for s in segments], program.depth
    )


def _joined(one: Program, other: Program) -> Program | None:
    """The identity with the edits of both, if they touch different layers."""
    try:
        ours, theirs = _edited(one), _edited(other)
    except ProgramError:
        return None
    layers, others = _layers(ours), _layers(theirs)
    if layers & others or len(layers | others) >= one.depth:
        return None
    try:
        return Program.from_edits(list(map(_edit, ours + theirs)), one.depth)
    except ProgramError:
        return None


def _edited(program: Program) -> list[Segment]:
    """Its segments that are not run just once. Raises ProgramError if it has no segments."""
    return [segment for segment in program.segments() if segment.op is not Op.KEEP]


def _layers(segments: Sequence[Segment]) -> set[int]:
    return {layer for segment in segments for layer in range(segment.start, segment.stop)}


def _edit(segment: Segment) -> Edit:
    if segment.op is Op.SKIP:
        return Edit(segment.start, segment.num_layers, Op.SKIP)
    return Edit(segment.start, segment.num_layers, Op.REPEAT, segment.times, segment.damping)
