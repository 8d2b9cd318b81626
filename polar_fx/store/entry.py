"""What the artifact store keeps for one key: reading it, writing it, and whether it may be used.

Artifacts are loaded as code. So an entry and its files are used only if they are plain files of
this user that nobody else can write to, and hold what was stored.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..output.digest import canonical, digest
from ..output.files import sync, write_file
from ..version import __version__

FORMAT = 1  # raised when the layout or the fields change; entries of other formats are made anew
SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"\.[0-9A-Za-z_]+")

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class StoredFile:
    """A file of an entry: the name its maker gave it, and where its content is."""

    name: str
    sha256: str
    num_bytes: int
    path: Path


@dataclass(frozen=True)
class Entry:
    """What was made for a key. `facts` are the fields the key was made of, for people to read."""

    key: str
    facts: dict[str, Scalar]
    files: dict[str, StoredFile]
    created: datetime
    used: datetime

    @property
    def num_bytes(self) -> int:
        """Size of its files; other entries may share them."""
        return total_bytes([self])


class UnfitError(Exception):
    """Why an entry may not be used, and the object that is to blame, if it is one.

    Never leaves the store.
    """

    def __init__(self, reason: str, culprit: Path | None = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


def total_bytes(entries: Iterable[Entry]) -> int:
    """Size of the entries' files, those that several share counted once."""
    return sum(
        {file.path: file.num_bytes for entry in entries for file in entry.files.values()}.values()
    )


def prepare_file(root: Path, made: Path) -> StoredFile:
    """Make a new file private and durable, and name the object of the store it is to become."""
    if not stat.S_ISREG(made.lstat().st_mode):
        raise InputError(f"only plain files can be stored, got {made}")
    made.chmod(0o600)
    sync(made)
    sha256 = _sha256(made)
    suffix = made.suffix if _SUFFIX.fullmatch(made.suffix) else ""
    return StoredFile(
        made.name, sha256, made.stat().st_size, root / "objects" / sha256[:2] / f"{sha256}{suffix}"
    )


def write_entry(
    root: Path, path: Path, *, key: str, facts: Mapping[str, Scalar], files: Iterable[StoredFile]
) -> None:
    """Write an entry that `read_entry` reads, durably."""
    fields = {
        "format": FORMAT,
        "key": key,
        "facts": dict(facts),
        "files": {
            f.name: {
                "sha256": f.sha256,
                "bytes": f.num_bytes,
                "object": f.path.relative_to(root).as_posix(),
            }
            for f in files
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "polar_fx": __version__,
    }
    write_file(path, json.dumps(fields | {"checksum": digest(fields)}, indent=1).encode())
    path.chmod(0o600)


def read_entry(root: Path, path: Path) -> Entry:
    """Parse an entry that is whole and ours; its files are not looked at.

    Raises UnfitError or FileNotFoundError.
    """
    try:
        status = path.lstat()
        if problem := _distrust(status):
            raise UnfitError(f"its entry {problem}")
        text = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnfitError(f"its entry cannot be read: {error}") from error
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise UnfitError(f"its entry has format {fields['format']!r}, not {FORMAT}")
        if fields.pop("checksum", None) != digest(fields):
            raise UnfitError("its entry was changed since it was written")
        if fields["key"] != path.stem:
            raise UnfitError(f"its entry belongs to key {fields['key']!r}")
        files = {
            name: _stored_file(root, name, fields=file) for name, file in fields["files"].items()
        }
        created, used = (
            datetime.fromisoformat(fields["created"]),
            datetime.fromtimestamp(status.st_mtime, UTC),
        )
        return Entry(path.stem, dict(fields["facts"]), files, created, used)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnfitError(f"its entry is malformed: {error!r}") from error


def check_facts(entry: Entry, facts: Mapping[str, Scalar]) -> None:
    """Raises UnfitError if the entry was made with other facts."""
    if canonical(entry.facts) != canonical(facts):
        one, two = _texts(entry.facts), _texts(facts)
        other = sorted(n for n in {*one, *two} if one.get(n) != two.get(n))
        raise UnfitError(f"it was made with other facts: {', '.join(other)}")


def _texts(facts: Mapping[str, Scalar]) -> dict[str, str]:
    return {name: canonical({name: value}) for name, value in facts.items()}


def check_file(file: StoredFile) -> None:
    """Hash the whole file. Raises UnfitError if it is not what was stored."""
    try:
        status = file.path.lstat()
        problem = _distrust(status)
        if not problem and status.st_size != file.num_bytes:
            problem = f"has {status.st_size} bytes instead of {file.num_bytes}"
        if not problem and _sha256(file.path) != file.sha256:
            problem = "is not what was stored"
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read: {error}"
    if problem:
        raise UnfitError(f"{file.name} {problem}", file.path)


def foreign(status: os.stat_result) -> str:
    """How someone else could change a file or folder, as the end of a sentence; empty if nobody
    could.
    """
    if not hasattr(os, "geteuid"):
        return ""  # not POSIX: owner and mode say nothing
    if status.st_uid != os.geteuid():
        return f"belongs to another user ({status.st_uid})"
    return "can be written by others" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _distrust(status: os.stat_result) -> str:
    return foreign(status) if stat.S_ISREG(status.st_mode) else "is not a plain file"


def _stored_file(root: Path, name: str, *, fields: Mapping[str, Any]) -> StoredFile:
    sha256, num_bytes, place = fields["sha256"], fields["bytes"], fields["object"]
    if not SHA256.fullmatch(sha256) or type(num_bytes) is not int:
        raise ValueError(f"{name}: {sha256!r}, {num_bytes!r}")
    start = f"objects/{sha256[:2]}/{sha256}"
    suffix = place.removeprefix(start)
    if not place.startswith(start) or (suffix and not _SUFFIX.fullmatch(suffix)):
        raise UnfitError(f"{name} is said to be where no object belongs: {place!r}")
    return StoredFile(name, sha256, num_bytes, root / place)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
