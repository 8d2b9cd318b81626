"""Files of a bundle: where they may be, and whether they are what the manifest says.

A bundle comes from elsewhere. So every path is checked before it is opened, links are not followed,
and each file is hashed whole before anything in it is used; what is used are the very bytes that
were hashed, if `verified` hands them out.
"""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import PolarError
from ..output.files import DISK_FULL
from .errors import BundleError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_PATH = re.compile(rf"{_PART}(?:/{_PART}){{0,3}}")
_CHUNK = 1 << 20
_PART_BYTES = 8 << 20  # read by one thread while the other hashes the one before

MAX_JSON_BYTES = 64 << 20


def problem_of_path(path: str) -> str | None:
    """Why a path of a manifest is not one of a file in the bundle, as the end of a sentence; None
    if it is.
    """
    if path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    if ".." in re.split(r"[/\\]", path):
        return "leaves the bundle's folder"
    return None if _PATH.fullmatch(path) else "is not a plain relative path"


class Reader:
    """A file of a bundle, read once and in order: what is handed out is what is hashed, in a thread
    beside the reading.
    """

    def __init__(self, path: Path, file: FileIO, *, hasher: Executor) -> None:
        self.path = path
        self._file, self._hasher, self._sha256 = file, hasher, hashlib.sha256()

    def readinto(self, memory: memoryview) -> None:
        """Fill a block of bytes, which must stay as it is until the file is closed.

        Raises BundleError where the file ends.
        """
        while memory:
            part = memory[:_PART_BYTES]
            num_read = self._file.readinto(part)
            if not num_read:
                raise BundleError(self.path, "ended while it was read")
            self._hasher.submit(self._sha256.update, part[:num_read])
            memory = memory[num_read:]

    def read(self, num_bytes: int) -> bytes:
        """The next bytes. Raises BundleError where the file ends."""
        memory = bytearray(num_bytes)
        self.readinto(memoryview(memory))
        return bytes(memory)

    def copy_to(self, target: Path) -> None:
        """Write the rest of the file to a new one. Raises BundleError."""
        with os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as new:
                while chunk := self._file.read(_CHUNK):
                    self._hasher.submit(self._sha256.update, chunk)
                    new.write(chunk)

    def finish(self) -> str:
        """Sha256 of the whole file, the rest of which is read."""
        self._hasher.shutdown()  # all that was handed out is hashed now
        while chunk := self._file.read(_CHUNK):
            self._sha256.update(chunk)
        return self._sha256.hexdigest()


@contextmanager
def verified(root: Path, path: str, *, num_bytes: int, sha256: str) -> Iterator[Reader]:
    """A file to be read once; at the end, the rest of it is read and the whole is held against the
    manifest.

    What was read may be used only after that. Raises BundleError if it is not what the manifest
    says, whatever else was found wrong with it, or if it is reached through a link.
    """
    place = root
    for part in path.split("/")[:-1]:
        place /= part
        _require(place, stat.S_ISDIR, what="a folder")
    full = root / path
    status = _require(full, stat.S_ISREG, what="a plain file")
    if status.st_size != num_bytes:
        what = "truncated" if status.st_size < num_bytes else "longer than it was"
        raise BundleError(
            full, f"is {what}: {status.st_size:,} bytes, the manifest says {num_bytes:,}"
        )
    with ThreadPoolExecutor(1) as hasher, _open(full) as file:
        reader, problem = Reader(full, file, hasher=hasher), None
        try:
            yield reader
        except BundleError as error:
            problem = error
        if reader.finish() != sha256:
            raise BundleError(
                full, "was changed or exchanged: its sha256 is not the one in the manifest"
            )
        if problem is not None:
            raise problem


@contextmanager
def _open(path: Path) -> Iterator[FileIO]:
    """A plain file, unbuffered, links not followed.

    Raises BundleError, also for what fails while it is read.
    """
    try:
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        )
        with open(handle, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise BundleError(path, f"cannot be read ({error.strerror or error})") from error


def digest_of(path: Path) -> str:
    """Sha256 of a plain file, links not followed. Raises BundleError."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a plain file of at most `limit` bytes. Raises BundleError."""
    status = _require(path, stat.S_ISREG, what="a plain file")
    if status.st_size > limit:
        raise BundleError(
            path, f"has {status.st_size:,} bytes, and such a file has at most {limit:,}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(path, f"cannot be read ({error.strerror or error})") from error


def parse_json(path: Path, text: bytes) -> Any:
    """Strict JSON: UTF-8, no name twice in one object, no NaN. Raises BundleError naming `path`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {twice[:80]!r} is there twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        # bad JSON, bad UTF-8, a number of thousands of digits, too deep
        raise BundleError(
            path, f"is not valid JSON: {str(error) or type(error).__name__}"
        ) from error


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a BundleError about `path`."""
    try:
        yield
    except PolarError:  # some of which are OSErrors, and say what is wrong
        raise
    except OSError as error:
        full = error.errno in DISK_FULL
        remedy = (
            "free some space there, or name a folder on another disk"
            if full
            else "name a place you can write to"
        )
        raise BundleError(
            path, f"cannot be written: {error.strerror or error}", remedy=remedy
        ) from error


def _require(path: Path, is_kind: Any, *, what: str) -> os.stat_result:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise BundleError(path, "is missing") from None
    except OSError as error:
        raise BundleError(path, f"cannot be read ({error.strerror or error})") from error
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(
            path,
            "is a symbolic link, which could lead out of the bundle",
            remedy="put the file itself there",
        )
    if not is_kind(status.st_mode):
        raise BundleError(path, f"is not {what}")
    return status
