"""Record files that are torn, damaged, full, interrupted or written by others."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polar_fx.errors import RecordFileError
from polar_fx.search.records.record_file import RecordReader, RecordStore
from polar_fx.search.records.records import encode_line, record_to_fields
from record_files import filled, ids_of, lines_of, record_worker, replace_line
from search_store_worker import HEADER, record


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_torn_last_line_is_cut_off(
    kept: int, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = filled(path, 1, 2, 3).read_bytes()
    last = lines_of(path)[-1]
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
    whole = filled(path, 1, 2).read_bytes()
    for last in (bytes(500), bytes(500) + b"\n", lines_of(path)[-1].replace(b'"q2"', b'"q3"')):
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
    replace_line(filled(path, 1, 2, 3), 3, change=change)
    before = path.read_bytes()
    for use in (lambda: RecordStore.open(path, HEADER), lambda: ids_of(path)):
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
    path.write_bytes(
        b"".join(line for i, line in enumerate(lines_of(path)) if i != 2)
    )  # the remedy
    assert ids_of(filled(path, 2)) == ["q1", "q3", "q2"]


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
    filled(path, 1, 2)
    replace_line(path, 2, change=lambda _: encode_line({**record_to_fields(record(1)), **changes}))
    with pytest.raises(RecordFileError, match=f"line 2 is damaged: {reason}"):
        ids_of(path)
    assert ids_of(path, strict=False) == ["q2"]


def test_fields_of_later_versions_are_passed_over(path: Path) -> None:
    filled(path, 1)
    replace_line(
        path, 2, change=lambda _: encode_line({**record_to_fields(record(1)), "tree": [1, 2]})
    )
    assert list(RecordReader(path)) == [record(1)]


@pytest.mark.parametrize("written", [0, 1, 100])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_loses_nothing(
    call: str, written: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = filled(path, 1).read_bytes()
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
    assert ids_of(path) == ["q1", "q2"]


def test_an_interrupted_write_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = filled(path, 1).read_bytes()
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
    count, message = json.loads(record_worker("fill", path, 20_000).communicate(timeout=60)[0])
    assert (
        "File too large" in message
        and f"the {count} before it are whole; free some space" in message
    )
    assert (
        count > 3
        and ids_of(path) == [f"q{number}" for number in range(1, count + 1)]
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
    assert ids_of(filled(path, 1)) == ["q1"]  # the lock is free


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
