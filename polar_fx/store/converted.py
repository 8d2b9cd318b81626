"""Models that were converted once, in the user's cache: listing and removing them.

`models.py` makes them, each under the lock of its name.
"""

import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..environment import cache_dir

_LOCK = ".lock"


@dataclass(frozen=True)
class ConvertedModel:
    """A folder of weights, or a file put together from packages, that is made again when it is
    needed.

    `used` is the last access to a file of it, as far as the file system notes that.
    """

    path: Path
    num_bytes: int
    created: datetime
    used: datetime

    @property
    def name(self) -> str:
        return self.path.name


def converted_folder() -> Path:
    """Where they are; it may not exist yet."""
    return cache_dir() / "models"


def converted_models() -> list[ConvertedModel]:
    """Those that are there, by name. Raises OSError."""
    folder = converted_folder()
    if not folder.is_dir():
        return []
    paths = [path for path in sorted(folder.iterdir()) if not _is_passing(path)]
    return [_converted(path) for path in paths]


def remove_converted(model: ConvertedModel) -> bool:
    """Remove one; False if a process is making it right now, or another was first.

    Raises OSError.
    """
    try:
        with FileLock(f"{model.path}{_LOCK}", timeout=0):
            doomed = model.path.with_name(f".{model.name}.{secrets.token_hex(8)}")
            model.path.rename(doomed)  # nobody reads half of it
    except (Timeout, FileNotFoundError):
        return False
    if doomed.is_dir():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()
    return True


def _is_passing(path: Path) -> bool:
    """Locks, and what is being written."""
    return path.suffix == _LOCK or path.name.startswith(".")


def _converted(path: Path) -> ConvertedModel:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    about = [file.stat() for file in files] or [path.stat()]
    used = max(max(each.st_atime, each.st_mtime) for each in about)
    return ConvertedModel(
        path,
        sum(each.st_size for each in about),
        datetime.fromtimestamp(path.stat().st_mtime, UTC),
        datetime.fromtimestamp(used, UTC),
    )
