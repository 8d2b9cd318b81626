"""Files written so that nobody meets half of one, and so that they outlive a crash."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError

# what the system says when there is no room
DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CHUNK = 1 << 20


def write_whole(content: bytes, path: str | os.PathLike[str]) -> Path:
    """Write a file a user named, replacing one that is there; nobody meets half of it.

    Raises InputError.
    """
    target = Path(path)
    try:
        replace_file(target, [content])
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, to make a file or a folder under; at the end of the block that is made
    durable and takes the name `path`, in place of a file, or an empty folder, that has it.

    If the block raises, nothing is left of it. Modes are those it was made with. Raises OSError.
    """
    work = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield work
        for part in (*(work.rglob("*") if work.is_dir() else ()), work):
            sync(part)
        os.replace(work, path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what is to be told
            shutil.rmtree(work) if work.is_dir() else work.unlink()
        raise
    sync(path.parent)


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all, replacing one that is.

    Raises OSError.
    """
    with replacing(path) as work, work.open("xb") as file:
        file.writelines(parts)


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
    """Make a file, or the names in a folder, durable. Raises OSError."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except OSError:
        if not is_folder:  # not every system opens folders
            raise
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in DISK_FULL or not is_folder:  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)
