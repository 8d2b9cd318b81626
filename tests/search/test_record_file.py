"""Search records on disk: what was finished stays, whatever happens to the process, the disk or the
file.
"""

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from places import ROOT
from polar_fx.errors import InputError, RecordFileError
from polar_fx.judge.verdict import Verdict
from polar_fx.questions.question import Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.records.record_file import RecordReader, RecordStore
from polar_fx.search.records.records import SearchRecord, encode_line
from record_files import filled, ids_of, lines_of, record_worker, replace_line
from search_store_worker import HEADER, record


def test_a_search_goes_on_where_it_ended(path: Path) -> None:
    filled(path, 1, 2)
    with RecordStore.open(str(path), HEADER) as store:
        assert store.done == {"q1", "q2"} and len(store) == 2 and store.header.created
        store.append(record(3))
        assert list(store) == [record(1), record(2), record(3)] and "q3" in store.done
    assert RecordReader(path).header.config == HEADER.config
    assert {p.name for p in path.parent.iterdir()} <= {"search.jsonl", "search.jsonl.lock"}


def test_records_that_do_not_belong_are_refused(path: Path) -> None:
    with RecordStore.open(path, HEADER) as store:
        store.append(record(1))
        with pytest.raises(InputError, match="question 'q1' has a record in .*; look at `done`"):
            store.append(record(1))
        with pytest.raises(InputError, match="the record has depth 4, .* has 6"):
            store.append(SearchRecord(Question("q2", "", "", ()), 4, Verdict(True), ()))
    assert ids_of(path) == ["q1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "e" * 32}, f"model is '{'f' * 32}' in the file and '{'e' * 32}' here"),
        ({"depth": 7}, "depth is 6 in the file and 7 here"),
        (
            {"config": SearchConfig(simulations=9, seed=1)},
            "config.seed is 0 in the file and 1 here, config.simulations is 8 .* 9 here",
        ),
        (
            {"task": {"name": "sequences"}},
            "task.name is 'arithmetic' in the file and 'sequences' here",
        ),
        ({"prompt": {"style": "few-shot"}}, "prompt.shots is 4 in the file and absent here"),
        (
            {"prompt": {**HEADER.prompt, "system": None}},
            "prompt.system is absent in the file and None here",
        ),
    ],
)
def test_another_search_is_refused_by_what_differs(
    changes: dict[str, Any], message: str, path: Path
) -> None:
    before = filled(path, 1).read_bytes()
    other = dataclasses.replace(HEADER, **changes)
    with pytest.raises(
        RecordFileError,
        match=rf"search.jsonl: it is of another search: {message}; name another file, or .*restart",
    ):
        RecordStore.open(path, other)
    assert path.read_bytes() == before
    with RecordStore.open(path, other, restart=True) as store:
        assert not store.done
    assert path.with_name("search.jsonl.old").read_bytes() == before


def test_software_and_time_may_differ(path: Path) -> None:
    filled(path, 1)
    with RecordStore.open(
        path, dataclasses.replace(HEADER, software={"torch": "9"}, created="later")
    ) as store:
        assert store.done == {"q1"} and store.header.software == HEADER.software


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            b'{"format": "polar_fx.search", "version": 2}\n',
            "version is 2 in the file, and 1 is what this polar_fx reads",
        ),
        (
            b'{"format": "parquet"}\n',
            "line 1 is not a header of search records: format is 'parquet', not 'polar_fx.search'",
        ),
        (
            b"a,b,c\n1,2,3\n",
            "line 1 is not a header of search records: it is not JSON: .*; name another file",
        ),
        (b"[]\n", "it is not a JSON object"),
        (b'{"format": "polar_fx.search"', "it ends within the line"),
        ("".join(["{}", "\n"]).encode("utf-16"), "byte 1 of the line is not UTF-8"),
        (pickle.dumps(list(range(9))), "line 1 is not a header of search records"),
    ],
)
def test_other_files_are_refused_and_left(header: bytes, message: str, path: Path) -> None:
    path.write_bytes(header)
    for opened in (
        lambda: RecordStore.open(path, HEADER),
        lambda: RecordReader(path, strict=False),
    ):
        with pytest.raises(RecordFileError, match=message):
            opened()
    assert path.read_bytes() == header


def test_an_edited_header_is_refused(path: Path) -> None:
    replace_line(filled(path, 1), 1, change=lambda line: line.replace(b'"depth":6', b'"depth":7'))
    with pytest.raises(RecordFileError, match="line 1 .* changed since it was written"):
        RecordStore.open(path, dataclasses.replace(HEADER, depth=7))


def test_a_setting_of_a_later_version_is_named(path: Path) -> None:
    filled(path, 1)
    later = json.loads(lines_of(path)[0])
    later["config"]["new"] = 1
    del later["sha256"]
    replace_line(path, 1, change=lambda _: encode_line(later))
    with pytest.raises(RecordFileError, match="config.new is 1 in the file and absent here"):
        RecordStore.open(path, HEADER)
    with pytest.raises(RecordFileError, match="unknown search setting 'new'"):
        list(RecordReader(path))


def test_a_header_must_be_json(path: Path) -> None:
    with pytest.raises(InputError, match="the task or prompt of a search header is not JSON"):
        RecordStore.open(path, dataclasses.replace(HEADER, task={"name": object()}))
    assert not path.exists()
    with RecordStore.open(path, dataclasses.replace(HEADER, task={"sizes": (1, 2)})):
        pass
    with RecordStore.open(path, dataclasses.replace(HEADER, task={"sizes": [1, 2]})):
        pass


def test_an_empty_file_and_a_missing_folder_are_made(path: Path) -> None:
    path.touch()
    assert ids_of(filled(path, 1)) == ["q1"]
    assert ids_of(filled(path.parent / "new" / "folder" / "file", 2)) == ["q2"]


def test_a_link_to_a_file_stays_one(path: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path.symlink_to(tmp_path / "disk" / "real.jsonl")
    filled(path, 1)
    assert path.is_symlink() and ids_of(tmp_path / "disk" / "real.jsonl") == ["q1"]


def test_an_unusable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordFileError, match="file/x.jsonl: .*; name a file that can be used"):
        RecordStore.open(tmp_path / "file" / "x.jsonl", HEADER)
    with pytest.raises(RecordFileError, match="No such file"):
        RecordReader(tmp_path / "none.jsonl")


def test_two_writers_are_refused(path: Path) -> None:
    worker = record_worker("hold", path)
    assert worker.stdout and worker.stdout.readline() == "ready\n"
    for restart in (False, True):
        with pytest.raises(
            RecordFileError,
            match="search.jsonl: another process is writing to it; wait until that ends, or name",
        ):
            RecordStore.open(path, HEADER, restart=restart)
    worker.communicate("end\n", timeout=60)
    with RecordStore.open(path, HEADER), pytest.raises(RecordFileError, match="another process"):
        RecordStore.open(path, HEADER)  # also within one process


def test_a_file_can_be_read_while_it_is_written(path: Path) -> None:
    worker = record_worker("write", path, 60)
    assert worker.stdout and worker.stdout.readline() == "ready\n"
    seen = []
    while not seen or seen[-1] < 60:
        found = ids_of(path)
        assert found == [f"q{number}" for number in range(len(found))]
        seen.append(len(found))
    worker.communicate(timeout=60)
    assert worker.returncode == 0 and seen == sorted(seen) and len(set(seen)) > 2


def test_kills_at_any_moment_lose_nothing_finished(path: Path) -> None:
    start = time.perf_counter()
    out = record_worker("kill_often", path, 50).communicate(timeout=120)[0]
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 50 and any(torn for _, torn, _ in results)
    finished: set[str] = set()
    for reported, _, done in results:
        finished |= set(reported)
        assert finished <= set(done)
    assert list(RecordReader(path)) == [record(number) for number in range(len(results[-1][2]))]
    assert len(finished) >= 50 and time.perf_counter() - start < 15


def test_reading_and_writing_need_no_torch() -> None:
    code = (
        "import sys, polar_fx.search.records.record_file, polar_fx.search.records.formats; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
