"""Artifacts on disk: content-addressed, checked before use, written whole or not at all, shared by
processes.

    objects/<first two digits>/<sha256><suffix>    files, named by what is in them
    entries/<key>.json                             what was made for a key; its mtime is when it was
    last used locks/<key>.lock                               held while that key is made
    locks/store.lock                               held while entries or objects are added or
    removed tmp/<key>-<random>/                            work in progress

What fails a check is refused with its reason, removed, and made again; see `entry.py`.
"""

import errno
import logging
import math
import os
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..environment import cache_dir, cache_limit_bytes
from ..errors import CacheError, InputError
from .entry import (
    SHA256,
    Entry,
    Scalar,
    StoredFile,
    UnfitError,
    check_facts,
    check_file,
    foreign,
    prepare_file,
    read_entry,
    total_bytes,
    write_entry,
)

__all__ = ["ArtifactStore", "Entry", "Refusal", "StoredFile", "total_bytes"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """An entry that was not used, and why."""

    key: str
    reason: str


class ArtifactStore:
    """The artifacts under a folder, `cache_dir()/artifacts` if not named.

    Any number of processes and threads may use one folder. `limit_bytes` is what the artifacts may
    take before the least recently used are removed; 0 is no limit, None takes it from the
    environment. `refusals` lists what this object refused.
    """

    def __init__(self, root: Path | None = None, limit_bytes: int | None = None) -> None:
        self.root = (cache_dir() / "artifacts" if root is None else root).absolute()
        self.limit_bytes = cache_limit_bytes() if limit_bytes is None else limit_bytes
        self.refusals: list[Refusal] = []

    def get(self, key: str, facts: Mapping[str, Scalar]) -> dict[str, Path] | None:
        """The checked files of a key by name; None if there are none, or none fit for use.

        Open them soon: another process that needs the room removes them once they are the least
        recently used.
        """
        path = self._entry_path(key)
        found = self._find(path, facts)
        if isinstance(found, Refusal):
            self.refusals.append(found)
            _log.warning("artifact %s is not used: %s", key[:12], found.reason)
            return None
        if found is None:
            return None
        try:
            _touch(path)
        except FileNotFoundError:  # evicted while it was checked
            return None
        except OSError as error:  # a store that may only be read serves as well
            _log.debug("cannot note the use of %s: %s", key[:12], error)
        return {name: file.path for name, file in found.files.items()}

    def get_or_make(
        self, key: str, facts: Mapping[str, Scalar], *, make: Callable[[Path], None]
    ) -> tuple[dict[str, Path], bool]:
        """The files of a key, and whether `make` had to write them, into the empty folder it is
        given.

        Processes that want the same key at the same time make it once. What `make` raises goes
        through, and nothing is stored then. Raises CacheError if the files cannot be stored.
        """
        found = self.get(key, facts)
        if found is not None:
            return found, False
        with self._os_errors():
            self._create_folders()
            lock = self._lock(key).acquire()
        with lock:
            found = self.get(key, facts)
            if found is not None:  # another process was first
                return found, False
            return self._make(key, facts, make=make), True

    def entries(self) -> list[Entry]:
        """All entries that can be read, the least recently used first.

        Their files are not checked.
        """
        found = []
        for path in self._entry_files():
            with suppress(UnfitError, FileNotFoundError):  # `verify` tells about the unfit ones
                found.append(read_entry(self.root, path))
        return sorted(found, key=lambda entry: entry.used)

    def verify(self, repair: bool = False) -> list[Refusal]:
        """Check every file of every entry.

        `repair` removes what is refused, and leftovers of processes that were killed.
        """
        found = [self._find(path, facts=None, remove=repair) for path in self._entry_files()]
        if repair and self.root.is_dir():
            with self._alone():
                self._sweep()
        return [refusal for refusal in found if isinstance(refusal, Refusal)]

    def clear(self, unused_s: float = 0.0) -> tuple[int, int]:
        """Remove the entries that were not used for so long; returns how many, and the bytes that
        became free.
        """
        if not self.root.is_dir():
            return 0, 0
        with self._alone():
            before = time.time() - unused_s if unused_s else math.inf
            old = [path for path in self._entry_files() if path.lstat().st_mtime <= before]
            for path in old:
                _remove(path)
            return len(old), self._sweep()

    # Looking

    def _find(
        self, path: Path, facts: Mapping[str, Scalar] | None, *, remove: bool = True
    ) -> Entry | Refusal | None:
        with suppress(UnfitError):
            return self._check(path, facts)
        # look again, alone: another process may have been replacing or evicting it
        with self._alone():
            try:
                return self._check(path, facts)
            except UnfitError as unfit:
                if remove:
                    _remove(path)
                    if unfit.culprit:
                        _remove(unfit.culprit)
                return Refusal(path.stem, str(unfit))

    def _check(self, path: Path, facts: Mapping[str, Scalar] | None) -> Entry | None:
        """The entry, every file of it verified; None if there is none. Raises UnfitError."""
        with self._os_errors():
            self._check_folders()
        try:
            entry = read_entry(self.root, path)
        except FileNotFoundError:
            return None
        if facts is not None:
            check_facts(entry, facts)
        for file in entry.files.values():
            self._check_folder(file.path.parent)
            check_file(file)
        return entry

    # Storing

    def _make(
        self, key: str, facts: Mapping[str, Scalar], *, make: Callable[[Path], None]
    ) -> dict[str, Path]:
        with self._os_errors():
            work = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=self.root / "tmp"))
        try:
            folder = work / "files"
            with self._os_errors():
                folder.mkdir(mode=0o700)
            make(folder)
            with self._os_errors():
                files = [prepare_file(self.root, made) for made in sorted(folder.iterdir())]
                write_entry(self.root, work / "entry.json", key=key, facts=facts, files=files)
            with self._alone():
                self._publish(key, work, files=files)
                self._evict(keep=key)
        finally:
            shutil.rmtree(work, ignore_errors=True)  # a sweep takes what this leaves
        return {file.name: file.path for file in files}

    def _publish(self, key: str, work: Path, *, files: list[StoredFile]) -> None:
        """Move the objects and then the entry to their places; all of them or none."""
        placed = []
        try:
            for file in files:
                file.path.parent.mkdir(mode=0o700, exist_ok=True)
                self._check_folder(file.path.parent)
                if not os.path.lexists(file.path):
                    placed.append(file.path)
                # one that is there may be damaged
                os.replace(work / "files" / file.name, file.path)
            os.replace(work / "entry.json", self._entry_path(key))
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
        _touch(self._entry_path(key))

    def _evict(self, keep: str) -> None:
        entries = self.entries()
        total = total_bytes(entries)
        if not self.limit_bytes or total <= self.limit_bytes:
            return
        uses = Counter(file.path for entry in entries for file in entry.files.values())
        for entry in entries:
            if total <= self.limit_bytes:
                break
            if entry.key == keep:
                continue
            _remove(self._entry_path(entry.key))
            for file in entry.files.values():
                uses[file.path] -= 1
                total -= 0 if uses[file.path] else file.num_bytes
        self._sweep()

    def _sweep(self) -> int:
        """Remove objects that no entry names, and the work of processes that are gone; returns the
        bytes of the objects.

        Only under the store's lock: no process is then between placing an object and placing its
        entry.
        """
        named = {file.path for entry in self.entries() for file in entry.files.values()}
        freed = 0
        for path in self.root.glob("objects/*/*"):
            if path not in named:
                freed += path.lstat().st_size
                _remove(path)
        for path in self.root.glob("tmp/*-*"):
            key = path.name.partition("-")[0]
            if SHA256.fullmatch(key):
                # Who works there holds the key's lock; that of a killed process is free.
                with suppress(Timeout), self._lock(key, timeout=0):
                    _remove(path)
        return freed

    # Folders and locks

    def _entry_path(self, key: str) -> Path:
        if not SHA256.fullmatch(key):
            raise InputError(
                f"a key is 64 lowercase hex digits, got {key!r}; make one with digest()"
            )
        return self.root / "entries" / f"{key}.json"

    def _entry_files(self) -> list[Path]:
        return sorted(self.root.glob("entries/*.json"))

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        # Lock files stay: removing one that another process waits for would let two in.
        return FileLock(
            self.root / "locks" / f"{name}.lock", timeout=timeout, mode=0o600, poll_interval=0.01
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the store's lock; never while something is made."""
        with self._os_errors():
            self._create_folders()
            with self._lock("store"):
                yield

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        """What the operating system refuses becomes a CacheError."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if full else "make it a folder you can write to"
            raise CacheError(str(self.root), error.strerror or str(error), remedy=remedy) from error

    def _create_folders(self) -> None:
        self.root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in self._folders():
            folder.mkdir(mode=0o700, exist_ok=True)
        self._check_folders()

    def _folders(self) -> list[Path]:
        # The root may be a link, to another disk say: the user's own doing.
        return [
            self.root.resolve(),
            *(self.root / name for name in ("objects", "entries", "locks", "tmp")),
        ]

    def _check_folders(self) -> None:
        for folder in self._folders():
            self._check_folder(folder)

    def _check_folder(self, folder: Path) -> None:
        """Raises CacheError if others could exchange what is in the folder."""
        with self._os_errors(), suppress(FileNotFoundError):
            status = folder.lstat()
            problem = foreign(status) if stat.S_ISDIR(status.st_mode) else "is not a folder"
            if problem:
                raise CacheError(
                    str(self.root),
                    f"{folder} {problem}",
                    remedy="make it yours alone (chmod -R go-w) or remove it",
                )


def _touch(path: Path) -> None:
    """Note a use, to the nanosecond: the file system's own clock may tick in milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
