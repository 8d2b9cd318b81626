"""Arms by generated answers, on part of the test questions: votes, confidence, sampling, and what
formats have to do with it.

A vote over k programs runs all k; its cost is counted so. Answers are graded as text here, so these
numbers are not those of teacher forcing: the identity is generated and graded beside them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from ..predictor.selector import Selector
from ..program import Program
from ..questions.question import places_of
from ..search.records.records import SearchRecord
from ..stats.arms import IDENTITY, ArmResult, pooled_names
from .answers import Answer, Answers, Rescues, Row, is_parsable, is_right, majority, most_confident
from .choices import SELECTOR_ACCURACY, Choice

_TEMPERATURE = 0.7
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class GeneratedArms:
    """Arms of generated answers, and of the selector what became of its gains, by task and over
    several; `answers` are what each program said to each question.
    """

    arms: list[ArmResult]
    answers: list[dict[Program, Answer]]
    rescues: dict[str, Rescues]
    agreement: float
    """Of the identity's answers, the share on which teacher forcing and grading agree."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the arms' outcomes."""
        num_questions = sum(arm.n for arm in self.arms if arm.name == self.arms[0].name)
        return {
            "n": num_questions,
            "agreement": self.agreement,
            "rescues": {task: asdict(found) for task, found in self.rescues.items()},
        }


@dataclass(frozen=True, eq=False)
class _Method:
    """A method's answers to N questions, and the steps and tokens of all that it ran for them."""

    name: str
    answers: list[Answer]
    steps: list[float]
    tokens: list[float]

    def graded(self, rows: Sequence[Row]) -> list[bool]:
        """Whether each answer is right."""
        return [is_right(a, q) for a, (q, _) in zip(self.answers, rows, strict=True)]


def generated_arms(
    answerer: Answers,
    selector: Selector,
    *,
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
    singles = [programs[0] for programs in chosen.programs]
    methods, answers = _methods(
        answerer, selector, chances=chances, singles=singles, rows=rows, votes=votes, seed=seed
    )
    graded = {method.name: method.graded(rows) for method in methods}
    members = places_of([question.task for question, _ in rows])
    arms = [
        _arm(
            method,
            graded,
            rows=rows,
            task=task,
            places=of,
            depth=selector.depth,
            unseen=task in unseen,
        )
        for method in methods
        for task, of in members.items()
    ]
    exact = [r.baseline.correct for r in records]
    method_exact = [r.verdicts[p].correct for r, p in zip(records, singles, strict=True)]
    together = {**{task: [task] for task in members}, **pooled_names(arms)}
    rescues = {}
    for name, tasks in together.items():
        places = [i for task in tasks for i in members[task]]
        rescues[name] = Rescues.of(
            _at(exact, places),
            _at(graded[IDENTITY], places),
            exact=_at(method_exact, places),
            graded=_at(graded[SELECTOR_ACCURACY], places),
        )
    agree = np.equal(exact, graded[IDENTITY])
    return GeneratedArms(arms, answers, rescues, float(agree.mean()))


def _methods(
    answerer: Answers,
    selector: Selector,
    *,
    chances: np.ndarray,
    singles: Sequence[Program],
    rows: Sequence[Row],
    votes: int,
    seed: int,
) -> tuple[list[_Method], list[dict[Program, Answer]]]:
    """The identity, the selector's choice, votes over programs, votes over samples; and each row's
    answers by its programs.
    """
    n, identity = len(rows), Program.identity(selector.depth)
    order = np.argsort(-chances, axis=1, kind="stable")
    candidates = [_with_identity(selector, row, count=votes) for row in order]
    wanted = [(identity, s, *c) for s, c in zip(singles, candidates, strict=True)]
    answers = _greedy(answerer, rows, programs=wanted)
    sampled = answerer.sampled(rows, identity, count=votes, temperature=_TEMPERATURE, seed=seed)
    methods = [
        _by_program(IDENTITY, answers, programs=[identity] * n),
        _by_program(SELECTOR_ACCURACY, answers, programs=singles),
        _of_several(f"vote of {votes} programs", answers, programs=candidates, pick=majority),
        _of_several(
            f"most confident of {votes} programs", answers, programs=candidates, pick=most_confident
        ),
        _of_samples(f"vote of {votes} samples of the identity", sampled, depth=selector.depth),
    ]
    return methods, answers


def _greedy(
    answerer: Answers, rows: Sequence[Row], *, programs: Sequence[Sequence[Program]]
) -> list[dict[Program, Answer]]:
    """Each row's answers by its programs; a program that is there twice runs once."""
    pairs = [(i, p) for i, each in enumerate(programs) for p in dict.fromkeys(each)]
    made = answerer.greedy([(rows[i], p) for i, p in pairs])
    found: list[dict[Program, Answer]] = [{} for _ in rows]
    for (i, program), answer in zip(pairs, made, strict=True):
        found[i][program] = answer
    return found


def _by_program(
    name: str, answers: Sequence[Mapping[Program, Answer]], *, programs: Sequence[Program]
) -> _Method:
    """One program a row."""
    given = [of_row[p] for of_row, p in zip(answers, programs, strict=True)]
    steps = [float(p.num_steps) for p in programs]
    return _Method(name, given, steps, [_tokens([answer]) for answer in given])


def _of_several(
    name: str,
    answers: Sequence[Mapping[Program, Answer]],
    *,
    programs: Sequence[Sequence[Program]],
    pick: Callable[[Sequence[Answer]], int],
) -> _Method:
    """Several programs a row, of whose answers `pick` takes one by its place."""
    found = _Method(name, [], [], [])
    for of_row, each in zip(answers, programs, strict=True):
        given = [of_row[p] for p in each]
        found.answers.append(given[pick(given)])
        found.steps.append(float(sum(p.num_steps for p in each)))
        found.tokens.append(_tokens(given))
    return found


def _of_samples(name: str, samples: Sequence[Sequence[Answer]], *, depth: int) -> _Method:
    """Several answers of the identity a row, of which the most frequent is taken."""
    picked = [several[majority(several)] for several in samples]
    steps = [float(depth * len(several)) for several in samples]
    return _Method(name, picked, steps, [_tokens(several) for several in samples])


def _arm(
    method: _Method,
    graded: Mapping[str, list[bool]],
    *,
    rows: Sequence[Row],
    task: str,
    places: Sequence[int],
    depth: int,
    unseen: bool,
) -> ArmResult:
    """The method on the rows of one task, which are at these places."""
    return ArmResult(
        method.name,
        task,
        np.array(_at(graded[method.name], places)),
        np.array(_at(graded[IDENTITY], places)),
        np.array(_at(method.steps, places)),
        np.full(len(places), float(depth)),
        format_valid=np.array([is_parsable(method.answers[i], rows[i][0]) for i in places]),
        generated_tokens=np.array(_at(method.tokens, places)),
        unseen=unseen,
    )


def _at(values: Sequence[T], places: Sequence[int]) -> list[T]:
    return [values[i] for i in places]


def _tokens(answers: Sequence[Answer]) -> float:
    return float(sum(answer.num_tokens for answer in answers))


def _with_identity(selector: Selector, order: np.ndarray, *, count: int) -> list[Program]:
    """The `count` likeliest programs, the identity among them."""
    best = [int(k) for k in order[:count]]
    if 0 not in best:
        best[-1] = 0
    return [selector.menu.programs[k] for k in best]
