"""Search records on disk: one file of JSON lines that only grows.

The first line is a header, each further one a record (see `records.py`), with a sha256 of itself. A
line is the unit of
loss: a process killed at any moment loses at most the question it had not finished. Lines, because
whatever reads text or JSON opens them, while the search runs as well; and nothing in them is
executed, as a pickle is.
"""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ...errors import InputError, RecordFileError
from ...output.files import replace_file
from .records import (
    FORMAT,
    VERSION,
    SearchHeader,
    SearchRecord,
    decode_line,
    encode_line,
    header_from_fields,
    header_to_fields,
    record_from_fields,
    record_to_fields,
    shorten,
)

__all__ = ["Damage", "RecordReader", "RecordStore"]

_log = logging.getLogger(__name__)
_RESUME = "run the search again: it continues with what is in the file"
_COMPARED = ("format", "version", "model", "depth", "config", "task", "prompt")


@dataclass(frozen=True, slots=True)
class Damage:
    """A line that is not used, and why."""

    line: int
    reason: str


class RecordReader:
    """The records of a file, read anew by each iteration; another process may be writing it.

    Raises RecordFileError if the file cannot be read or is none of ours, and at a damaged line;
    with strict=False such lines are skipped, and `damage` lists those of the last iteration. A last
    line that a kill cut short, or that is being written, is not damage but `tail`.
    """

    def __init__(self, path: str | Path, *, strict: bool = True) -> None:
        self.path = Path(path)
        self.strict = strict
        self.damage: list[Damage] = []
        self.tail: Damage | None = None
        self.end = 0
        """Where the last whole line ends, in bytes."""
        with _os_errors(self.path), self.path.open("rb") as file:
            self.header_fields = _read_header(self.path, file.readline())

    @property
    def header(self) -> SearchHeader:
        """Raises RecordFileError if a setting of it is not known here."""
        try:
            return header_from_fields(self.header_fields)
        except InputError as error:
            raise _not_ours(self.path, str(error)) from error

    def __iter__(self) -> Iterator[SearchRecord]:
        depth = self.header.depth
        for number, fields in self.lines():
            try:
                record = record_from_fields(fields, depth)
            except InputError as error:
                self._refuse(Damage(number, str(error)))
                continue
            yield record

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The numbers and fields of all whole lines after the header; what a program's text says is
        not checked.
        """
        self.damage, self.tail = [], None
        found: dict[str, int] = {}
        with _os_errors(self.path), self.path.open("rb") as file:
            self.end = len(file.readline())
            position = self.end
            for number, line in enumerate(file, start=2):
                if self.tail:  # it was not the last one
                    damage, self.tail = self.tail, None
                    self._refuse(damage)
                position += len(line)
                # cut short, or still being written: what a next read gives is its rest
                if not line.endswith(b"\n"):
                    self.tail = Damage(number, "it ends within the line")
                    return
                try:
                    fields = decode_line(line)
                    name = fields.get("id")
                    if not isinstance(name, str):
                        raise InputError("it is no record: its id is missing")
                    if name in found:
                        raise InputError(f"it repeats question {name!r} of line {found[name]}")
                except InputError as error:
                    self.tail = Damage(number, str(error))
                    continue
                found[name] = number
                self.end = position
                yield number, fields

    def _refuse(self, damage: Damage) -> None:
        if self.strict:
            raise RecordFileError(
                str(self.path),
                f"line {damage.line} is damaged: {damage.reason}; the file was left as it is",
                remedy="bring back a copy of it, or delete that line and its question is searched "
                "again; RecordReader(path, strict=False) reads all others",
            )
        self.damage.append(damage)
        _log.warning("%s: line %d is skipped: %s", self.path, damage.line, damage.reason)


class RecordStore:
    """A file of records that this process alone appends to. Make one by `open`, and use it in one
    thread.

    Iteration reads the records back.
    """

    def __init__(
        self,
        path: Path,
        header: SearchHeader,
        *,
        lock: FileLock,
        file: BinaryIO,
        done: set[str],
        end: int,
    ) -> None:
        self.path, self.header = path, header
        self._lock, self._file, self._done, self._end = lock, file, done, end

    @classmethod
    def open(
        cls, path: str | Path, header: SearchHeader, *, restart: bool = False
    ) -> "RecordStore":
        """Make the file, or go on in one with the same model, depth, config, task and prompt.

        `restart` begins a new file; the old one stays beside it as `<name>.old`. A last line cut
        short by a kill is removed. Raises RecordFileError if the file is in use, damaged, of
        another search, or cannot be written.
        """
        path = Path(path).resolve()  # a link stays one when a new file is moved to it
        with _os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                raise RecordFileError(
                    str(path),
                    "another process is writing to it",
                    remedy="wait until that ends, or name another file",
                ) from None
        try:
            with _os_errors(path):
                if restart and path.exists():
                    os.replace(path, f"{path}.old")
                if not path.exists() or not path.stat().st_size:
                    header = replace(
                        header, created=datetime.now(UTC).isoformat(timespec="seconds")
                    )
                    replace_file(path, [encode_line(_as_json(header))])
                return cls._resume(path, header, lock=lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _resume(cls, path: Path, header: SearchHeader, *, lock: FileLock) -> "RecordStore":
        reader = RecordReader(path)
        _check_same(path, reader.header_fields, here=_as_json(header))
        # Unbuffered, so that a record is one write.
        file = path.open("ab+", buffering=0)
        try:
            done = {str(fields["id"]) for _, fields in reader.lines()}
            if reader.tail:
                torn = os.fstat(file.fileno()).st_size - reader.end
                _log.warning(
                    "%s: line %d, %d bytes, is cut off: %s",
                    path,
                    reader.tail.line,
                    torn,
                    reader.tail.reason,
                )
                file.truncate(reader.end)
                os.fsync(file.fileno())
            return cls(path, reader.header, lock=lock, file=file, done=done, end=reader.end)
        except BaseException:
            file.close()
            raise

    @property
    def done(self) -> Set[str]:
        """The ids of the questions that have a record."""
        return self._done

    def __len__(self) -> int:
        return len(self._done)

    def __iter__(self) -> Iterator[SearchRecord]:
        return iter(RecordReader(self.path))

    def append(self, record: SearchRecord) -> None:
        """Add a record; it is on disk when this returns.

        Raises InputError if its question has one or its depth is another, RecordFileError if it
        cannot be written: the file is then as it was before.
        """
        if record.question.id in self._done:
            raise InputError(
                f"question {record.question.id!r} has a record in {self.path}; look at `done` "
                "before searching"
            )
        if record.depth != self.header.depth:
            raise InputError(
                f"the record has depth {record.depth}, {self.path} has {self.header.depth}"
            )
        line = encode_line(record_to_fields(record))
        self._check_untouched()
        try:
            _write(self._file, line)
            os.fsync(self._file.fileno())
        except BaseException as error:
            # also an interruption: half a line would damage the next one
            whole = self._take_back()
            if not isinstance(error, OSError):
                raise
            kept = (
                "whole"
                if whole
                else "whole, and the torn line after them goes when it is opened again"
            )
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise RecordFileError(
                str(self.path),
                f"the record of question {record.question.id!r} cannot be written: "
                f"{error.strerror or error}; the {len(self)} before it are {kept}",
                remedy=f"{'free some space' if full else 'make it a file that can be written'}, "
                f"then {_RESUME}",
            ) from error
        self._end += len(line)
        self._done.add(record.question.id)

    def close(self) -> None:
        """Close the file, so that others may write to it."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> "RecordStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_untouched(self) -> None:
        """Raises RecordFileError if the file is no longer what was opened; appending would lose or
        damage records.
        """
        opened = os.fstat(self._file.fileno())
        try:
            reason = (
                ""
                if os.path.samestat(opened, self.path.stat())
                else "it was exchanged for another file"
            )
        except FileNotFoundError:
            reason = "it was removed"
        if not reason and opened.st_size != self._end:
            reason = f"it has {opened.st_size} bytes instead of {self._end}"
        if reason:
            raise RecordFileError(
                str(self.path), f"{reason} while this search wrote to it", remedy=_RESUME
            )

    def _take_back(self) -> bool:
        with suppress(OSError):
            self._file.truncate(self._end)
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size == self._end


def _write(file: BinaryIO, line: bytes) -> None:
    # One call; only a full disk or a signal leaves a rest, and the next call tells which.
    done = 0
    while done < len(line):
        done += os.write(file.fileno(), memoryview(line)[done:])


def _as_json(header: SearchHeader) -> dict[str, Any]:
    """As it reads back from a file. Raises InputError."""
    fields = header_to_fields(header)
    try:
        return json.loads(json.dumps(fields, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the task or prompt of a search header is not JSON: {error}") from error


def _read_header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        fields = decode_line(line, check=False)
    except InputError as error:
        raise _not_ours(path, str(error)) from error
    if fields.get("format") != FORMAT:
        raise _not_ours(path, f"format is {shorten(fields.get('format'))}, not {FORMAT!r}")
    if fields.get("version") != VERSION:
        raise RecordFileError(
            str(path),
            f"version is {shorten(fields.get('version'))} in the file, and {VERSION} is what this "
            "polar_fx reads",
            remedy="use the polar_fx that wrote it, or name another file",
        )
    try:
        return decode_line(line)
    except InputError as error:
        raise _not_ours(path, str(error)) from error


def _not_ours(path: Path, reason: str) -> RecordFileError:
    return RecordFileError(
        str(path), f"line 1 is not a header of search records: {reason}", remedy="name another file"
    )


def _compared(fields: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_flat({name: fields.get(name) for name in _COMPARED}))


def _check_same(path: Path, there: Mapping[str, Any], *, here: Mapping[str, Any]) -> None:
    old, new = _compared(there), _compared(here)
    different = [
        f"{name} is {shorten(old[name]) if name in old else 'absent'} in the file and "
        f"{shorten(new[name]) if name in new else 'absent'} here"
        for name in sorted({*old, *new})
        if name not in old or name not in new or old[name] != new[name]
    ]
    if different:
        raise RecordFileError(
            str(path),
            f"it is of another search: {', '.join(different)}",
            remedy="name another file, or begin anew with restart",
        )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a RecordFileError."""
    try:
        yield
    except OSError as error:
        raise RecordFileError(
            str(path), error.strerror or str(error), remedy="name a file that can be used"
        ) from error
