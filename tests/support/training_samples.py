"""Programs, questions, records and tables to train on, for the tests of training."""

from typing import Any

from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import Question
from polar_fx.search.records.records import Explored, SearchRecord
from polar_fx.training.verdict_table import VerdictTable

DEPTH = 8


IDENTITY = Program.identity(DEPTH)


A, B, C, D = (Program.parse(t, DEPTH) for t in ("skip 3", "skip 4-5", "repeat 6", "skip 0"))


def question(name: str, task: str = "t", *, cell: str = "c") -> Question:
    return Question(name, task, f"what is {name}?", ("1",), None, cell)


def record(
    name: str,
    baseline: bool,
    *,
    right: dict[Program, bool],
    task: str = "t",
    cell: str = "c",
    **more: Any,
) -> SearchRecord:
    def verdict(correct: bool) -> Verdict:
        return Verdict(correct, -0.1 if correct else -3.0, 1.0 if correct else -1.0)

    explored = tuple(Explored(p, verdict(r), float(r)) for p, r in right.items())
    return SearchRecord(question(name, task, cell=cell), DEPTH, verdict(baseline), explored, **more)


def table(
    rows: list[tuple[bool, dict[Program, bool]]], cells: list[str] | None = None
) -> VerdictTable:
    names = cells or ["c"] * len(rows)
    return VerdictTable.of(
        [record(f"q{i}", base, right=right, cell=names[i]) for i, (base, right) in enumerate(rows)]
    )
