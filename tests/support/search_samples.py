"""Six search records whose figures can be found by hand, for test_analysis.py and
test_analyze.py.
"""

from pathlib import Path

from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions.question import Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.records.record_file import RecordStore
from polar_fx.search.records.records import Explored, SearchHeader, SearchRecord

DEPTH = 6
IDENTITY = Program.identity(DEPTH)
SKIP, REPEAT = Program.parse("skip 2", DEPTH), Program.parse("repeat 3", DEPTH)
SKIP_TWO, DAMPED = Program.parse("skip 0-1", DEPTH), Program.parse("repeat 0-1 @0.5", DEPTH)
MIXED = Program.parse("skip 1, repeat 4 x3", DEPTH)
MOVED = Program.from_path([0, 2, 1, 4, 5], DEPTH)  # no segments do this
HEADER = SearchHeader("f" * 32, DEPTH, SearchConfig(simulations=2))


def record(
    name: str,
    baseline: Verdict,
    *,
    explored: dict[Program, Verdict],
    verified: dict[Program, bool] | None = None,
    seconds: float | None = None,
    task: str = "add",
    difficulty: int | None = None,
    cell: str = "",
) -> SearchRecord:
    rows = tuple(
        Explored(program, verdict, float(verdict.correct)) for program, verdict in explored.items()
    )
    again = {program: Verdict(correct) for program, correct in (verified or {}).items()}
    question = Question(name, task, f"{name}?", ("1",), difficulty, cell)
    return SearchRecord(question, DEPTH, baseline, rows, 1, seconds, again)


def simple(
    name: str, right: set[Program], *, wrong: set[Program] | None = None, baseline: bool = False
) -> SearchRecord:
    """A record of right and wrong programs."""
    verdicts = {
        program: Verdict(program in right) for program in sorted(right | (wrong or set()), key=str)
    }
    return record(name, Verdict(baseline), explored=verdicts)


SAMPLES = [
    record(
        "q1",
        Verdict(False, -2.0),
        explored={SKIP: Verdict(True, -1.0), REPEAT: Verdict(False, -3.0)},
        verified={SKIP: True},
        seconds=1.0,
        difficulty=1,
        cell="a",
    ),
    record(
        "q2",
        Verdict(True, -0.5),
        explored={SKIP: Verdict(False, -2.5), REPEAT: Verdict(True, -0.25)},
        verified={REPEAT: True, IDENTITY: False},
        seconds=2.0,
        difficulty=1,
        cell="b",
    ),
    record(
        "q3",
        Verdict(False, -3.0),
        explored={MIXED: Verdict(True, -1.0), MOVED: Verdict(True, -1.5)},
        verified={MIXED: False, MOVED: False},
        seconds=1.0,
        difficulty=2,
        cell="a",
    ),
    record("q4", Verdict(True), explored={SKIP_TWO: Verdict(True)}, task="mul"),
    record("q5", Verdict(False), explored={DAMPED: Verdict(True)}, task="mul"),
    record("q6", Verdict(False), explored={}, task="mul"),
]


def write(path: Path, records: list[SearchRecord], *, header: SearchHeader = HEADER) -> Path:
    """Write them as a search does."""
    with RecordStore.open(path, header) as store:
        for each in records:
            store.append(each)
    return path
