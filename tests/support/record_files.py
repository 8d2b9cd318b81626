"""Record files that are filled, read and changed line by line, for their tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import search_store_worker
from places import ROOT
from polar_fx.program import Program
from polar_fx.search.records.record_file import RecordReader, RecordStore
from search_store_worker import DEPTH, HEADER, record

IDENTITY = Program.identity(DEPTH)


def filled(path: Path, *numbers: int) -> Path:
    with RecordStore.open(path, HEADER) as store:
        for number in numbers:
            store.append(record(number))
    return path


def ids_of(path: Path, strict: bool = True) -> list[str]:
    return [each.question.id for each in RecordReader(path, strict=strict)]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def replace_line(path: Path, number: int, *, change: Callable[[bytes], bytes]) -> None:
    lines = lines_of(path)
    lines[number - 1] = change(lines[number - 1])
    path.write_bytes(b"".join(lines))


def record_worker(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, search_store_worker.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
