"""Verdict tables: every program on every question, from records that can be gone on with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_fx.errors import InputError, RecordFileError
from polar_fx.questions import EncodedQuestion
from polar_fx.training.verdict_table import VerdictTable, listed_records
from training_samples import DEPTH, IDENTITY, A, B, C, question, record, table


def test_a_table_has_every_program_on_every_question() -> None:
    made = table([(True, {A: False, B: True}), (False, {B: False, A: True})])
    assert made.programs == (IDENTITY, A, B) and made.right.tolist() == [
        [True, False, True],
        [False, True, False],
    ]
    assert made.log_likelihood[0].tolist() == [-0.1, -3.0, -0.1] and made.steps.tolist() == [
        8,
        7,
        6,
    ]
    assert made.choose([B]).right.tolist() == [[True, True], [False, False]]
    assert made.rows(np.array([False, True])).right.tolist() == [[False, True, False]]
    other = table([(True, {C: True, A: False}), (False, {C: False, A: True})])
    assert made.beside(other).programs == (IDENTITY, A, B, C) and made.beside(other).right[
        :, 3
    ].tolist() == [True, False]
    with pytest.raises(InputError, match="'q1' has no verdict of program 0-3 6-7"):
        table([(True, {A: False, B: True}), (False, {A: True})])
    with pytest.raises(InputError, match="different questions"):
        made.beside(made.rows(np.array([1, 0])))
    with pytest.raises(InputError, match="no question was asked"):
        VerdictTable.of([])


class Runs:
    """Answers as a function tells, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, rows: Any, programs: Any) -> Any:
        for q, _ in rows:
            self.asked.append(q.id)
            yield record(q.id, False, right={p: p == A for p in programs[q.id]})


def test_listed_records_go_on_where_they_ended(tmp_path: Path) -> None:
    rows = [(question(f"q{i}"), EncodedQuestion(f"q{i}", (1,), (2,), ((3,),))) for i in range(5)]
    programs = {q.id: (A, B) if q.id != "q1" else (C,) for q, _ in rows}
    runs = Runs()
    stopped = iter([0, 0])

    def broken(left: Any, wanted: Any) -> Any:
        for each in runs(left, wanted):
            next(stopped)
            yield each

    def listed(programs: Any, run: Any, *, model: str = "m", **more: Any) -> Any:
        return listed_records(
            tmp_path / "a.jsonl",
            rows,
            programs=programs,
            model=model,
            depth=DEPTH,
            prompt={},
            run=run,
            **more,
        )

    with pytest.raises((StopIteration, RuntimeError)):
        listed(programs, broken)
    seen: list[tuple[int, int]] = []
    found = listed(programs, runs, progress=lambda *a: seen.append(a))
    assert [r.question.id for r in found] == ["q0", "q1", "q2", "q3", "q4"]
    assert seen[-1] == (5, 5)
    assert runs.asked == ["q0", "q1", "q2", "q2", "q3", "q4"], (
        "only the question in flight is run again"
    )
    assert [e.program for e in found[1].explored] == [C]
    assert listed(programs, runs) == found and len(runs.asked) == 6
    for other, model in (({**programs, "q0": (A,)}, "m"), (programs, "n")):
        with pytest.raises(RecordFileError, match="another search"):
            listed(other, runs, model=model)
