"""Search many questions at once: each has a search of its own, and what they ask for next is judged
together.

Searches wait for rewards in lockstep, so that an evaluator sees many (question, program) pairs in
one call and can share work among them.
"""

import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..judge.verdict import Verdict, get_reward
from ..program import Program
from ..questions.question import EncodedQuestion, Question
from .config import SearchConfig
from .methods.edits import Search
from .methods.registry import get_method, question_seed
from .methods.scan import listed
from .records.records import Explored, SearchRecord


class Evaluator(Protocol):
    """Judges programs on questions."""

    def evaluate(self, pairs: Sequence[tuple[EncodedQuestion, Program]]) -> list[Verdict]:
        """A verdict a pair, in order."""
        ...

    def forget(self, question_ids: Iterable[str]) -> None:
        """No further pair of these questions will come."""
        ...


@dataclass
class _Running:
    """The search of one question."""

    question: Question
    encoded: EncodedQuestion
    seed: int
    search: Generator[list[Program], list[float], None]
    asked: list[Program]
    verdicts: dict[Program, Verdict] = field(default_factory=dict)
    rewards: dict[Program, float] = field(default_factory=dict)
    seconds: float = 0.0


def run_searches(
    questions: Iterable[tuple[Question, EncodedQuestion]],
    evaluator: Evaluator,
    depth: int,
    config: SearchConfig,
    *,
    in_flight: int = 32,
    verifier: Evaluator | None = None,
    programs: Mapping[str, Sequence[Program]] | None = None,
    runs: Callable[[Program], bool] | None = None,
) -> Iterator[SearchRecord]:
    """A record a question, as they finish; `in_flight` are searched at a time.

    `verifier` judges every program found valid once more, by itself. The identity comes first in
    each search and is not charged to its budget. `questions` is read as searches finish, so it may
    be a queue. With `programs`, by question id, these are looked at instead of those that a method
    would choose. Of the latter, those that the model does not run are left out (`runs`).
    """
    reward = get_reward(config.reward)
    start = get_method(config.method) if programs is None else None
    waiting = iter(questions)
    running: list[_Running] = []
    while True:
        while len(running) < in_flight and (row := next(waiting, None)) is not None:
            question, encoded = row
            seed = question_seed(config.seed, question.id)
            method = start or listed((programs or {})[question.id])
            search = method(depth, config, random.Random(seed))
            if runs is not None and programs is None:
                search = _only(search, runs)
            running.append(_Running(question, encoded, seed, search, next(search)))
        if not running:
            return
        pairs = [(each.encoded, program) for each in running for program in each.asked]
        began = time.perf_counter()
        verdicts = iter(evaluator.evaluate(pairs))
        seconds = (time.perf_counter() - began) / len(pairs)
        going_on: list[_Running] = []
        finished: list[_Running] = []
        for each in running:
            for program in each.asked:
                each.verdicts[program] = next(verdicts)
                each.rewards[program] = reward(each.verdicts[program])
            each.seconds += seconds * len(each.asked)
            try:
                each.asked = each.search.send([each.rewards[p] for p in each.asked])
                going_on.append(each)
            except StopIteration:
                finished.append(each)
        running = going_on
        for each in finished:
            evaluator.forget([each.question.id])
            yield _record(each, depth, verifier=verifier)


def _only(search: Search, runs: Callable[[Program], bool]) -> Search:
    """The search without the programs that are not run: it is told a reward of 0 of these. The
    identity, which comes first, is always run.
    """
    asked = next(search)
    while True:
        known = {program: 0.0 for program in asked if not runs(program)}
        left = [program for program in asked if program not in known]
        if left:
            known |= zip(left, (yield left), strict=True)
        try:
            asked = search.send([known[program] for program in asked])
        except StopIteration:
            return


def _record(done: _Running, depth: int, *, verifier: Evaluator | None) -> SearchRecord:
    identity = Program.identity(depth)
    explored = tuple(
        Explored(p, v, done.rewards[p]) for p, v in done.verdicts.items() if p != identity
    )
    verified: dict[Program, Verdict] = {}
    if verifier is not None and (valid := [p for p, v in done.verdicts.items() if v.correct]):
        verified = dict(
            zip(valid, verifier.evaluate([(done.encoded, p) for p in valid]), strict=True)
        )
        verifier.forget([done.question.id])
    return SearchRecord(
        done.question, depth, done.verdicts[identity], explored, done.seed, done.seconds, verified
    )
