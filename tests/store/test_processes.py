"""The artifact store when disks are full, processes race, and processes are killed."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import store_worker
from places import ROOT
from polar_fx.errors import CacheError, InputError
from polar_fx.store import ArtifactStore, total_bytes
from polar_fx.store.entry import UnfitError
from store_worker import contents, facts, key, maker, put, read


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts", limit_bytes=0)


def _worker(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, store_worker.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _files(store: ArtifactStore) -> set[Path]:
    """Everything but locks and folders."""
    return {
        p
        for p in store.root.rglob("*")
        if p.parent.name != "locks" and (p.is_symlink() or not p.is_dir())
    }


def _entry(store: ArtifactStore, number: int) -> Path:
    return store.root / "entries" / f"{key(number)}.json"


# Failures while storing


def test_what_make_raises_goes_through_and_leaves_nothing(store: ArtifactStore) -> None:
    def make(folder: Path) -> None:
        maker(1)(folder)
        raise OSError(errno.ENOSPC, "the compiler's own folder is full")

    with pytest.raises(OSError, match="the compiler's own"):
        store.get_or_make(key(1), facts(1), make=make)
    assert _files(store) == set() and list((store.root / "tmp").iterdir()) == []
    assert read(put(store, 1)) == contents(1)


def test_only_plain_files_are_stored(store: ArtifactStore) -> None:
    with pytest.raises(InputError, match="only plain files"):
        store.get_or_make(key(1), facts(1), make=lambda folder: (folder / "inner").mkdir())
    assert store.entries() == []


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_full_disk_leaves_what_was_there(
    name: str, call: int, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 4)  # shares a file with artifact 1
    before, calls, real = _files(store), iter(range(100)), getattr(os, name)

    def full(*arguments: Any) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(os, name, full)
    with pytest.raises(
        CacheError,
        match=r"No space left on device; free some space.*POLAR_FX_CACHE_DIR.*cache=False",
    ) as caught:
        put(store, 1)
    assert str(store.root) in str(caught.value)
    monkeypatch.undo()
    assert (
        _files(store) == before
        and store.verify() == []
        and list((store.root / "tmp").iterdir()) == []
    )
    assert read(store.get(key(4), facts(4))) == contents(4)
    assert read(put(store, 1)) == contents(1)


def test_an_unusable_folder_is_named_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CacheError,
        match=f"cannot keep artifacts in {tmp_path}/file/artifacts: .*; make it a folder you",
    ):
        ArtifactStore(tmp_path / "file" / "artifacts").get_or_make(
            key(1), facts(1), make=lambda _: pytest.fail("made")
        )


def test_a_store_that_may_only_be_read_serves(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "mkdir", "replace", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    assert read(store.get(key(1), facts(1))) == contents(1)


# Many processes


def test_eight_processes_make_an_artifact_once(tmp_path: Path) -> None:
    workers = [_worker("race", tmp_path / "artifacts", tmp_path / "log") for _ in range(8)]
    assert all(w.stdout and w.stdout.readline() == "ready\n" for w in workers)
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = [json.loads(worker.communicate(timeout=60)[0]) for worker in workers]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert sorted(made for made, _ in results) == [False] * 7 + [True]
    assert all(right for _, right in results)


def test_threads_make_an_artifact_once(store: ArtifactStore) -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        maker(1)(folder)

    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda _: store.get_or_make(key(1), facts(1), make=make)[0], range(8))
        )
    assert len(made) == 1 and all(read(paths) == contents(1) for paths in found)


def test_eviction_by_others_is_never_taken_for_damage(tmp_path: Path) -> None:
    workers = [_worker("churn", tmp_path / "artifacts", seed) for seed in range(4)]
    assert [json.loads(worker.communicate(timeout=60)[0]) for worker in workers] == [[[], 0]] * 4
    store = ArtifactStore(tmp_path / "artifacts", 0)
    assert store.verify() == [] and total_bytes(store.entries()) <= 120_000
    assert len(list(store.root.glob("objects/*/*"))) == len(
        {f.path for e in store.entries() for f in e.files.values()}
    )


@pytest.mark.parametrize("then", ["evicted", "made again"])
def test_what_another_process_changes_meanwhile_is_not_damage(
    then: str, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)

    def check(file: Any) -> None:  # the first time, the other process is quicker
        monkeypatch.undo()
        ArtifactStore(store.root).clear()
        if then == "made again":
            put(ArtifactStore(store.root, 0), 1)
        raise UnfitError("code.pt2 is missing", file.path)

    monkeypatch.setattr("polar_fx.store.store.check_file", check)
    assert read(store.get(key(1), facts(1))) == (None if then == "evicted" else contents(1))
    assert store.refusals == [] and store.verify() == []


def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    out = _worker("kill_often", tmp_path / "artifacts", 100).communicate(timeout=120)[0]
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 100 and all(refused == [] for _, refused in results)
    stored = {number for numbers, _ in results for number in numbers}
    assert len(stored) >= 100
    store = ArtifactStore(tmp_path / "artifacts", 0)
    assert store.verify(repair=True) == []
    assert all(read(store.get(key(number), facts(number))) == contents(number) for number in stored)
    assert list((store.root / "tmp").iterdir()) == []
    assert set(store.root.glob("objects/*/*")) == {
        f.path for e in store.entries() for f in e.files.values()
    }


def test_a_kill_before_any_file_operation_leaves_a_store_that_verifies(
    store: ArtifactStore, tmp_path: Path
) -> None:
    """While one artifact is refused, one is stored and one is evicted."""
    for number in (0, 1, 2):
        put(store, number)
    table = next(
        p for p in store.root.glob("objects/*/*") if p.read_bytes() == contents(0)["table.bin"]
    )
    table.write_bytes(b"damaged")
    limit = sum(len(content) for number in (2, 9) for content in contents(number).values())
    worker = _worker("kill_everywhere", store.root, tmp_path / "killed", limit)
    worker.communicate(timeout=120)
    assert worker.returncode == 0
    roots = sorted((tmp_path / "killed").iterdir(), key=lambda root: int(root.name))
    evicted = []
    for root in roots:
        left = ArtifactStore(root, 0)
        # The damage of artifact 0 shows as long as its entry is there, which goes first.
        assert {r.key for r in left.verify()} == ({key(0)} if _entry(left, 0).exists() else set())
        evicted.append(not _entry(left, 1).exists())
        for number in (1, 2, 9):
            assert read(left.get(key(number), facts(number))) in (None, contents(number))
        left.verify(repair=True)
        assert left.verify() == [] and list((root / "tmp").iterdir()) == []
        assert set(root.glob("objects/*/*")) == {
            f.path for e in left.entries() for f in e.files.values()
        }
        assert read(put(left, 9)) == contents(9)
    assert len(roots) > 50 and evicted[0] is False and evicted[-1] is True
