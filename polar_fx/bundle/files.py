"""Files of a bundle: where they may be, whether they are what the manifest says, and how they are written.

A bundle comes from elsewhere. So every path is checked before it is opened, links are not followed, and each file is
hashed whole before anything in it is used.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PolarError
from .errors import BundleError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_PATH = re.compile(rf"{_PART}(?:/{_PART}){{0,3}}")
_CHUNK = 1 << 20
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

MAX_JSON_BYTES = 64 << 20


def problem_of_path(path: str) -> str | None:
    """Why a path of a manifest is not one of a file in the bundle, as the end of a sentence; None if it is."""
    if path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    if ".." in re.split(r"[/\\]", path):
        return "leaves the bundle's folder"
    return None if _PATH.fullmatch(path) else "is not a plain relative path"


def check_file(root: Path, path: str, num_bytes: int, sha256: str) -> None:
    """Hash the whole file. Raises BundleError if it is not what the manifest says, or is reached through a link."""
    place = root
    for part in path.split("/")[:-1]:
        place /= part
        _require(place, stat.S_ISDIR, "a folder")
    full = root / path
    status = _require(full, stat.S_ISREG, "a plain file")
    if status.st_size != num_bytes:
        what = "truncated" if status.st_size < num_bytes else "longer than it was"
        raise BundleError(full, f"is {what}: {status.st_size:,} bytes, the manifest says {num_bytes:,}")
    if digest_of(full) != sha256:
        raise BundleError(full, "was changed or exchanged: its sha256 is not the one in the manifest")


def digest_of(path: Path) -> str:
    """Sha256 of a plain file, links not followed. Raises BundleError."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(path, f"cannot be read ({error.strerror or error})") from error


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a plain file of at most `limit` bytes. Raises BundleError."""
    status = _require(path, stat.S_ISREG, "a plain file")
    if status.st_size > limit:
        raise BundleError(path, f"has {status.st_size:,} bytes, and such a file has at most {limit:,}")
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
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of thousands of digits, too deep
        raise BundleError(path, f"is not valid JSON: {str(error) or type(error).__name__}") from error


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a BundleError about `path`."""
    try:
        yield
    except PolarError:  # some of which are OSErrors, and say what is wrong
        raise
    except OSError as error:
        full = error.errno in _FULL
        remedy = "free some space there, or name a folder on another disk" if full else "name a place you can write to"
        raise BundleError(path, f"cannot be written: {error.strerror or error}", remedy) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a new file, durably."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy contents (not modes: what is private in the artifact store is meant to be shipped), durably."""
    with source.open("rb") as old, target.open("xb") as new:
        while chunk := old.read(_CHUNK):
            new.write(chunk)
        new.flush()
        os.fsync(new.fileno())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in _FULL or not path.is_dir():  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)


def _require(path: Path, is_kind: Any, what: str) -> os.stat_result:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise BundleError(path, "is missing") from None
    except OSError as error:
        raise BundleError(path, f"cannot be read ({error.strerror or error})") from error
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(path, "is a symbolic link, which could lead out of the bundle", "put the file itself there")
    if not is_kind(status.st_mode):
        raise BundleError(path, f"is not {what}")
    return status
