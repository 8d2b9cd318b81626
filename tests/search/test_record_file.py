"""Search records on disk: what was finished stays, whatever happens to the process, the disk or the
file.
"""

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import search_store_worker
from places import ROOT
from polar_fx.errors import InputError, RecordFileError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions.question import Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.records.record_file import RecordReader, RecordStore
from polar_fx.search.records.records import SearchRecord, encode_line, record_to_fields
from search_store_worker import DEPTH, HEADER, record

IDENTITY = Program.identity(DEPTH)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.jsonl"


def _filled(path: Path, *numbers: int) -> Path:
    with RecordStore.open(path, HEADER) as store:
        for number in numbers:
            store.append(record(number))
    return path


def _ids(path: Path, strict: bool = True) -> list[str]:
    return [each.question.id for each in RecordReader(path, strict=strict)]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _replace_line(path: Path, number: int, change: Callable[[bytes], bytes]) -> None:
    lines = _lines(path)
    lines[number - 1] = change(lines[number - 1])
    path.write_bytes(b"".join(lines))


def _worker(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, search_store_worker.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# Making, going on, refusing


def test_a_search_goes_on_where_it_ended(path: Path) -> None:
    _filled(path, 1, 2)
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
    assert _ids(path) == ["q1"]


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
    before = _filled(path, 1).read_bytes()
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
    _filled(path, 1)
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
    _replace_line(_filled(path, 1), 1, lambda line: line.replace(b'"depth":6', b'"depth":7'))
    with pytest.raises(RecordFileError, match="line 1 .* changed since it was written"):
        RecordStore.open(path, dataclasses.replace(HEADER, depth=7))


def test_a_setting_of_a_later_version_is_named(path: Path) -> None:
    _filled(path, 1)
    later = json.loads(_lines(path)[0])
    later["config"]["new"] = 1
    del later["sha256"]
    _replace_line(path, 1, lambda _: encode_line(later))
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
    assert _ids(_filled(path, 1)) == ["q1"]
    assert _ids(_filled(path.parent / "new" / "folder" / "file", 2)) == ["q2"]


def test_a_link_to_a_file_stays_one(path: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path.symlink_to(tmp_path / "disk" / "real.jsonl")
    _filled(path, 1)
    assert path.is_symlink() and _ids(tmp_path / "disk" / "real.jsonl") == ["q1"]


def test_an_unusable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordFileError, match="file/x.jsonl: .*; name a file that can be used"):
        RecordStore.open(tmp_path / "file" / "x.jsonl", HEADER)
    with pytest.raises(RecordFileError, match="No such file"):
        RecordReader(tmp_path / "none.jsonl")


# Damage


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_torn_last_line_is_cut_off(
    kept: int, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _filled(path, 1, 2, 3).read_bytes()
    last = _lines(path)[-1]
    path.write_bytes(whole[: len(whole) - len(last)] + last[:kept])
    reader = RecordReader(path)
    assert (
        [r.question.id for r in reader] == ["q1", "q2"]
        and reader.damage == []
        and reader.tail
        and reader.tail.line == 4
    )
    with RecordStore.open(path, HEADER) as store:
        assert store.done == {"q1", "q2"}
        store.append(record(3))
    assert path.read_bytes() == whole
    assert f"line 4, {len(last[:kept])} bytes, is cut off: it ends within the line" in caplog.text


def test_a_last_line_of_zeros_or_with_a_wrong_sum_is_cut_off(path: Path) -> None:
    whole = _filled(path, 1, 2).read_bytes()
    for last in (bytes(500), bytes(500) + b"\n", _lines(path)[-1].replace(b'"q2"', b'"q3"')):
        # as a power cut leaves it, where the length was written before the content
        path.write_bytes(whole + last)
        with RecordStore.open(path, HEADER) as store:
            assert store.done == {"q1", "q2"}
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda line: line.replace(b"true", b"false", 1),
            "it was changed since it was written: its sha256 does not fit",
        ),
        (lambda line: line[: len(line) // 2] + b"\n", "it is not JSON"),
        (lambda line: b"\n", "it is not JSON"),
        (
            lambda line: line.decode().replace("·", "\xb7").encode("latin-1"),
            "byte [0-9]+ of the line is not UTF-8",
        ),
        (
            lambda line: line.replace(b'"seed":', b'"seed":NaN,"s":'),
            "it is not JSON: Out of range float",
        ),
        (lambda line: b"[" * 100_000 + b"\n", "it is not JSON"),
        (lambda line: encode_line({"question": "?"}), "it is no record: its id is missing"),
        (
            lambda line: encode_line(record_to_fields(record(1))),
            "it repeats question 'q1' of line 2",
        ),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_lost(
    change: Callable[[bytes], bytes], reason: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _replace_line(_filled(path, 1, 2, 3), 3, change)
    before = path.read_bytes()
    for use in (lambda: RecordStore.open(path, HEADER), lambda: _ids(path)):
        with pytest.raises(
            RecordFileError,
            match=f"search.jsonl: line 3 is damaged: {reason}.* left as it is.*; .*delete that "
            "line",
        ):
            use()
    assert path.read_bytes() == before
    reader = RecordReader(path, strict=False)
    for _ in range(2):
        assert [each.question.id for each in reader] == ["q1", "q3"]
        assert [damage.line for damage in reader.damage] == [3] and reader.tail is None
    assert "line 3 is skipped" in caplog.text
    path.write_bytes(b"".join(line for i, line in enumerate(_lines(path)) if i != 2))  # the remedy
    assert _ids(_filled(path, 2)) == ["q1", "q3", "q2"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"baseline": None}, "baseline is None, not an object"),
        ({"seed": True}, "seed is True, not a whole number"),
        ({"answers": [1]}, r"answers is \[1\], not a list of texts"),
        (
            {"explored": [["0-5", True]]},
            r"explored\[0\] is \['0-5', True\], not a list of program, correct",
        ),
        ({"explored": [["0-9", True, None, None, 1.0]]}, "'0-9' is no program of 6 layers: "),
        ({"explored": [[5, True, None, None, 1.0]]}, "5 is no program of 6 layers: "),
        ({"explored": [["0-4", "yes", None, None, 1.0]]}, "correct is 'yes', not true or false"),
        (
            {"explored": [["0-4", True, "high", None, 1.0]]},
            "log_likelihood is 'high', not a number",
        ),
        (
            {"explored": [["0-5", True, None, None, 1.0]]},
            "in the record of question 'q1', the identity is among the explored",
        ),
    ],
)
def test_a_line_of_another_program_is_checked(
    changes: dict[str, Any], reason: str, path: Path
) -> None:
    """Its sha256 is right, its fields are not."""
    _filled(path, 1, 2)
    _replace_line(path, 2, lambda _: encode_line({**record_to_fields(record(1)), **changes}))
    with pytest.raises(RecordFileError, match=f"line 2 is damaged: {reason}"):
        _ids(path)
    assert _ids(path, strict=False) == ["q2"]


def test_fields_of_later_versions_are_passed_over(path: Path) -> None:
    _filled(path, 1)
    _replace_line(path, 2, lambda _: encode_line({**record_to_fields(record(1)), "tree": [1, 2]}))
    assert list(RecordReader(path)) == [record(1)]


# Failures while writing


@pytest.mark.parametrize("written", [0, 1, 100])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_loses_nothing(
    call: str, written: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _filled(path, 1).read_bytes()
    whole = os.write

    def full(file: int, data: bytes = b"") -> int:
        if call == "write" and written and os.fstat(file).st_size == len(before):
            return whole(file, bytes(data[:written]))
        monkeypatch.undo()  # taking back what was written works
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RecordStore.open(path, HEADER) as store:
        monkeypatch.setattr(os, call, full)
        with pytest.raises(
            RecordFileError,
            match="question 'q2' cannot be written: No space .*; the 1 before it are whole; free",
        ) as error:
            store.append(record(2))
        assert (
            str(path) in str(error.value) and path.read_bytes() == before and store.done == {"q1"}
        )
        store.append(record(2))
    assert _ids(path) == ["q1", "q2"]


def test_an_interrupted_write_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _filled(path, 1).read_bytes()
    whole = os.write

    def interrupted(file: int, data: bytes) -> int:
        whole(file, bytes(data[:50]))
        raise KeyboardInterrupt

    with RecordStore.open(path, HEADER) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.append(record(2))
        assert path.read_bytes() == before and store.done == {"q1"}


def test_a_file_that_may_not_grow_keeps_what_is_there(path: Path) -> None:
    count, message = json.loads(_worker("fill", path, 20_000).communicate(timeout=60)[0])
    assert (
        "File too large" in message
        and f"the {count} before it are whole; free some space" in message
    )
    assert (
        count > 3
        and _ids(path) == [f"q{number}" for number in range(1, count + 1)]
        and path.read_bytes().endswith(b"\n")
    )


def test_a_failed_start_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RecordFileError, match="No space left"):
            RecordStore.open(path, HEADER)
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == []
    assert _ids(_filled(path, 1)) == ["q1"]  # the lock is free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "it was removed"),
        (
            lambda path: (path.rename(f"{path}.moved"), path.write_bytes(b"")),
            "it was exchanged for another file",
        ),
        (lambda path: path.write_bytes(b""), "it has 0 bytes instead of [0-9]+"),
    ],
)
def test_a_file_changed_by_others_gets_no_record(
    change: Callable[[Path], None], message: str, path: Path
) -> None:
    with RecordStore.open(path, HEADER) as store:
        store.append(record(1))
        change(path)
        with pytest.raises(RecordFileError, match=f"{message} while this search wrote to it"):
            store.append(record(2))


# Many processes


def test_two_writers_are_refused(path: Path) -> None:
    worker = _worker("hold", path)
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
    worker = _worker("write", path, 60)
    assert worker.stdout and worker.stdout.readline() == "ready\n"
    seen = []
    while not seen or seen[-1] < 60:
        found = _ids(path)
        assert found == [f"q{number}" for number in range(len(found))]
        seen.append(len(found))
    worker.communicate(timeout=60)
    assert worker.returncode == 0 and seen == sorted(seen) and len(set(seen)) > 2


def test_kills_at_any_moment_lose_nothing_finished(path: Path) -> None:
    start = time.perf_counter()
    out = _worker("kill_often", path, 50).communicate(timeout=120)[0]
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
