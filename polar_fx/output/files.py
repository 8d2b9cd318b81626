"""Files written so that nobody meets half of one, and so that they outlive a crash."""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import InputError

# what the system says when there is no room
DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CHUNK = 1 << 20


def write_whole(content: bytes, path: str | os.PathLike[str]) -> Path:
    """Write a file under another name and rename it, so that nobody meets half of it.

    Raises InputError.
    """
    target = Path(path)
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            work.write_bytes(content)
            os.replace(work, target)
        finally:
            work.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; name a file in a folder you can "
            "write to"
        ) from error
    return target


def made_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder, made if it is not there. Raises InputError."""
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {place}: {error.strerror or error}; name one that can be made"
        ) from error
    return place


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all, replacing one that is.

    Raises OSError.
    """
    made = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with made.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system opens folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file, durably."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy contents (not modes: what is private in the artifact store is meant to be shipped),
    durably.
    """
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
        if error.errno in DISK_FULL or not path.is_dir():  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)
