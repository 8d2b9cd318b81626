"""Processes for test_record_file.py: some write, some are killed.

They load no torch, so that they start quickly.
"""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from polar_fx.errors import RecordFileError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions.question import Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.records.record_file import RecordStore
from polar_fx.search.records.records import Explored, SearchHeader, SearchRecord

DEPTH = 6
HEADER = SearchHeader(
    "f" * 32,
    DEPTH,
    SearchConfig(simulations=8),
    {"name": "arithmetic"},
    {"style": "few-shot", "shots": 4},
)


def record(number: int) -> SearchRecord:
    """The record of question `number`, of some hundred to some thousand bytes."""
    chosen = random.Random(number)
    programs = {
        Program.identity(DEPTH).skip(chosen.randrange(5)).repeat(chosen.randrange(4), 1, 2 + i)
        for i in range(number % 30)
    }
    explored = [
        Explored(
            program,
            Verdict(chosen.random() < 0.2, -chosen.expovariate(1), chosen.gauss(0, 3)),
            chosen.random(),
        )
        for program in sorted(programs, key=str)
    ]
    question = Question(
        f"q{number}",
        "arithmetic",
        f"{number} · 2 = ?",
        (str(2 * number), f"{2 * number}.0"),
        1 + number % 5,
        "1x1",
    )
    return SearchRecord(
        question,
        DEPTH,
        Verdict(number % 2 == 0, -0.5, 0.25),
        tuple(explored),
        chosen.getrandbits(64),
        0.125,
    )


def kill_often(path: Path, kills: int) -> None:
    """Kill processes that keep appending at random moments; prints what each had finished and what
    is in the file since.
    """
    moments = random.Random(kills)
    whole = os.write

    def slow_write(file: int, data: bytes) -> int:
        time.sleep(0.0005)
        return whole(file, bytes(data[:60]))

    for attempt in range(kills):
        get, report = os.pipe()
        child = os.fork()
        if not child:
            if attempt % 2:  # a system that takes some bytes at a time: kills leave torn lines
                os.write = slow_write
            with RecordStore.open(path, HEADER) as store:
                for number in itertools.count():
                    if f"q{number}" not in store.done:
                        store.append(record(number))
                        whole(report, f"q{number}\n".encode())
        os.close(report)
        with os.fdopen(get) as lines:
            first = lines.readline()
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            finished = [line.strip() for line in (first, *lines)]
        size = path.stat().st_size
        with RecordStore.open(path, HEADER) as store:
            torn = size - path.stat().st_size
            print(json.dumps([finished, torn, sorted(store.done)]), flush=True)


def fill(path: Path, limit_bytes: int) -> None:
    """Append until a file may not grow any more; prints how many records came in, and the error."""
    with RecordStore.open(path, HEADER) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        for number in itertools.count(1):
            try:
                store.append(record(number))
            except RecordFileError as error:
                print(json.dumps([len(store), str(error)]))
                return


def hold(path: Path) -> None:
    """Keep the file open until told to end."""
    with RecordStore.open(path, HEADER):
        print("ready", flush=True)
        sys.stdin.readline()


def write(path: Path, count: int) -> None:
    """Append so many records, a few bytes at a time."""
    whole = os.write
    os.write = lambda file, data: whole(file, bytes(data)[:100])
    with RecordStore.open(path, HEADER) as store:
        print("ready", flush=True)
        for number in range(count):
            store.append(record(number))


if __name__ == "__main__":
    mode, target, *arguments = sys.argv[1:]
    {"kill_often": kill_often, "fill": fill, "hold": hold, "write": write}[mode](
        Path(target), *map(int, arguments)
    )
