"""Arms by generated answers, on part of the test questions: votes, confidence, sampling, and what
formats have to do with it.

A vote over k programs runs all k; its cost is counted so. Answers are graded as text here, so these
numbers are not those of teacher forcing: the identity is generated and graded beside them.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..predictor.selector import Selector
from ..program import Program
from ..search.records.records import SearchRecord
from ..stats.arms import IDENTITY, ArmResult, pooled_names
from .answers import Answer, Answerer, Rescues, Row, is_parsable, is_right, majority, most_confident
from .choices import SELECTOR_ACCURACY, Choice

_TEMPERATURE = 0.7


@dataclass(frozen=True, eq=False)
class GeneratedArms:
    """Arms of generated answers, and of the selector what became of its gains, by task and over
    several.
    """

    arms: list[ArmResult]
    rescues: dict[str, Rescues]
    agreement: float
    """Of the identity's answers, the share on which teacher forcing and grading agree."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the arms' outcomes."""
        return {
            "n": sum(a.n for a in self.arms if a.name == self.arms[0].name),
            "agreement": self.agreement,
            "rescues": {task: asdict(found) for task, found in self.rescues.items()},
        }


def generated_arms(
    answerer: Answerer,
    selector: Selector,
    chances: np.ndarray,
    chosen: Choice,
    records: Sequence[SearchRecord],
    rows: Sequence[Row],
    votes: int,
    seed: int,
    unseen: Collection[str] = (),
) -> GeneratedArms:
    """Generate, grade and compare on these rows, whose probabilities f64[N, K], choices and records
    are in the same order.

    `unseen` are tasks the predictor was not trained on.
    """
    n, identity = len(rows), Program.identity(selector.depth)
    order = np.argsort(-chances, axis=1, kind="stable")
    ranked = [_with_identity(selector, row, votes) for row in order]
    singles = [programs[0] for programs in chosen.programs]
    pairs = dict.fromkeys((i, p) for i in range(n) for p in (identity, singles[i], *ranked[i]))
    answers = dict(zip(pairs, answerer.greedy([(rows[i], p) for i, p in pairs]), strict=True))
    sampled = answerer.sampled(rows, identity, votes, _TEMPERATURE, seed)

    def of(i: int, programs: Sequence[Program]) -> list[Answer]:
        return [answers[i, p] for p in programs]

    made: dict[str, tuple[list[Answer], list[float], list[float]]] = {
        IDENTITY: (
            of_each := [answers[i, identity] for i in range(n)],
            [selector.depth * 1.0] * n,
            _tokens(of_each),
        ),
        SELECTOR_ACCURACY: (
            picked := [answers[i, singles[i]] for i in range(n)],
            [p.num_steps * 1.0 for p in singles],
            _tokens(picked),
        ),
    }
    costs = [float(sum(p.num_steps for p in ranked[i])) for i in range(n)]
    all_tokens = [float(sum(a.num_tokens for a in of(i, ranked[i]))) for i in range(n)]
    for name, pick in (("vote", majority), ("most confident", most_confident)):
        best = [of(i, ranked[i])[pick(of(i, ranked[i]))] for i in range(n)]
        made[f"{name} of {votes} programs"] = (best, costs, all_tokens)
    best = [row[majority(row)] for row in sampled]
    spent = [float(sum(a.num_tokens for a in row)) for row in sampled]
    made[f"vote of {votes} samples of the identity"] = (
        best,
        [selector.depth * float(votes)] * n,
        spent,
    )
    graded = {
        name: [is_right(a, q) for a, (q, _) in zip(found, rows, strict=True)]
        for name, (found, _, _) in made.items()
    }
    tasks = list(dict.fromkeys(q.task for q, _ in rows))
    members = {task: [i for i, (q, _) in enumerate(rows) if q.task == task] for task in tasks}
    arms = [
        ArmResult(
            name,
            task,
            np.array([graded[name][i] for i in members[task]]),
            np.array([graded[IDENTITY][i] for i in members[task]]),
            np.array([steps[i] for i in members[task]]),
            np.full(len(members[task]), float(selector.depth)),
            format_valid=np.array([is_parsable(found[i], rows[i][0]) for i in members[task]]),
            generated_tokens=np.array([tokens[i] for i in members[task]]),
            unseen=task in unseen,
        )
        for name, (found, steps, tokens) in made.items()
        for task in tasks
    ]
    exact = [r.baseline.correct for r in records]
    method = [r.verdicts[p].correct for r, p in zip(records, singles, strict=True)]
    flags = (exact, graded[IDENTITY], method, graded[SELECTOR_ACCURACY])
    together = {**{task: [task] for task in tasks}, **pooled_names(arms)}
    rescues = {
        name: Rescues.of(*([f[i] for task in of for i in members[task]] for f in flags))
        for name, of in together.items()
    }
    return GeneratedArms(
        arms,
        rescues,
        float(np.mean([e == g for e, g in zip(exact, graded[IDENTITY], strict=True)])),
    )


def _tokens(answers: Sequence[Answer]) -> list[float]:
    return [float(a.num_tokens) for a in answers]


def _with_identity(selector: Selector, order: np.ndarray, count: int) -> list[Program]:
    """The `count` likeliest programs, the identity among them."""
    best = [int(k) for k in order[:count]]
    return [selector.menu.programs[k] for k in (best if 0 in best else [*best[:-1], 0])]
