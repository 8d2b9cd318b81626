"""The artifact store: what it refuses, what it shows, and what it throws away."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polar_fx.environment import cache_limit_bytes
from polar_fx.errors import CacheError, InputError
from polar_fx.output.digest import digest
from polar_fx.store import ArtifactStore, Refusal, total_bytes
from store_worker import contents, facts, key, maker, put, read


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts", limit_bytes=0)


def _files(store: ArtifactStore) -> set[Path]:
    """Everything but locks and folders."""
    return {
        p
        for p in store.root.rglob("*")
        if p.parent.name != "locks" and (p.is_symlink() or not p.is_dir())
    }


def _entry(store: ArtifactStore, number: int) -> Path:
    return store.root / "entries" / f"{key(number)}.json"


def _add(store: ArtifactStore, facts: dict[str, Any], **files: bytes) -> str:
    def make(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    store.get_or_make(digest(facts), facts, make=make)
    return digest(facts)


def test_round_trip(store: ArtifactStore) -> None:
    assert store.get(key(1), facts(1)) is None
    paths, made = store.get_or_make(key(1), facts(1), make=maker(1))
    assert made and read(paths) == contents(1)
    assert paths["code.pt2"].suffix == ".pt2"  # what loads it may go by the suffix
    again = ArtifactStore(store.root)
    assert again.get(key(1), facts(1)) == paths
    assert again.get_or_make(key(1), facts(1), make=lambda _: pytest.fail("made twice")) == (
        paths,
        False,
    )
    (entry,) = again.entries()
    assert (entry.key, entry.facts, entry.num_bytes) == (
        key(1),
        facts(1),
        sum(map(len, contents(1).values())),
    )
    assert {f.name: f.path for f in entry.files.values()} == paths
    assert again.refusals == again.verify() == []


def test_digests_depend_on_values_and_types_not_on_order_or_process() -> None:
    assert digest({"a": 1, "b": "x"}) == digest({"b": "x", "a": 1})
    assert (
        len(
            {digest({"a": value}) for value in (1, 1.5, True, None, "1", "True")}
            | {digest({"b": 1})}
        )
        == 7
    )
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize("bad", ["", "../" * 20 + "etc", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_keys_are_digests(store: ArtifactStore, bad: str) -> None:
    with pytest.raises(InputError, match="64 lowercase hex digits"):
        store.get_or_make(bad, {}, make=maker(1))


# Refusals. Each function damages artifact 1 and names the object that goes, if one does.


def _object(store: ArtifactStore) -> Path:
    sha256 = hashlib.sha256(contents(1)["code.pt2"]).hexdigest()
    return store.root / "objects" / sha256[:2] / f"{sha256}.pt2"


def _rewrite(store: ArtifactStore, **changes: Any) -> None:
    """Change an entry and make its checksum fit, as an older version or an attacker would."""
    fields = json.loads(_entry(store, 1).read_text())
    del fields["checksum"]
    fields |= changes
    _entry(store, 1).write_text(json.dumps(fields | {"checksum": digest(fields)}))


def _move_object(store: ArtifactStore, place: str) -> None:
    """Let the entry name a file elsewhere that has the right content."""
    files = json.loads(_entry(store, 1).read_text())["files"]
    (store.root.parent / "outside.pt2").write_bytes(contents(1)["code.pt2"])
    _rewrite(store, files=files | {"code.pt2": files["code.pt2"] | {"object": place}})


def _link(path: Path, store: ArtifactStore) -> None:
    outside = store.root.parent / "outside.pt2"
    shutil.move(path, outside)
    path.symlink_to(outside)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def _truncate(store: ArtifactStore) -> None:
    _object(store).write_bytes(_object(store).read_bytes()[:-1])


def _flip(store: ArtifactStore) -> None:
    data = bytearray(_object(store).read_bytes())
    data[len(data) // 2] ^= 1
    _object(store).write_bytes(data)


def _edit_entry(store: ArtifactStore) -> None:
    _entry(store, 1).write_text(_entry(store, 1).read_text().replace("code.pt2", "core.pt2"))


DAMAGES: dict[str, tuple[Callable[[ArtifactStore], object], bool, str]] = {
    "truncated": (_truncate, True, "code.pt2 has"),
    "flipped byte": (_flip, True, "code.pt2 is not what was stored"),
    "missing object": (lambda s: _object(s).unlink(), True, "code.pt2 is missing"),
    "object is a link": (lambda s: _link(_object(s), s), True, "code.pt2 is not a plain file"),
    "object is a folder": (
        lambda s: _replace_by_folder(_object(s)),
        True,
        "code.pt2 is not a plain file",
    ),
    "object writable": (
        lambda s: _object(s).chmod(0o602),
        True,
        "code.pt2 can be written by others",
    ),
    "other format": (lambda s: _rewrite(s, format=0), False, "has format 0, not 1"),
    "not JSON": (lambda s: _entry(s, 1).write_bytes(b"\xff{"), False, "malformed"),
    "empty entry": (lambda s: _entry(s, 1).write_text(""), False, "malformed"),
    "not an object": (lambda s: _entry(s, 1).write_text("[[1]]"), False, "malformed"),
    "deep JSON": (lambda s: _entry(s, 1).write_text("[" * 100_000), False, "malformed"),
    "no format": (lambda s: _entry(s, 1).write_text("{}"), False, "malformed: KeyError('format')"),
    "fields of other types": (lambda s: _rewrite(s, files=[1]), False, "malformed"),
    "sizes of other types": (
        lambda s: _rewrite(s, files={"a": {"sha256": "0" * 64, "bytes": "1", "object": ""}}),
        False,
        "malf",
    ),
    "edited entry": (_edit_entry, False, "changed since it was written"),
    "other facts": (
        lambda s: _rewrite(s, facts=facts(1) | {"body": "x", "more": 1}),
        False,
        "other facts: body, more",
    ),
    "other type of fact": (
        lambda s: _rewrite(s, facts=facts(1) | {"number": True}),
        False,
        "other facts: number",
    ),
    "other key": (lambda s: _rewrite(s, key=key(2)), False, f"belongs to key '{key(2)}'"),
    "path leaves the store": (
        lambda s: _move_object(s, "../outside.pt2"),
        False,
        "where no object belongs: '../outside.pt2'",
    ),
    "absolute path": (
        lambda s: _move_object(s, str(s.root.parent / "outside.pt2")),
        False,
        "where no object belongs",
    ),
    "entry is a link": (lambda s: _link(_entry(s, 1), s), False, "its entry is not a plain file"),
    "entry is a folder": (
        lambda s: _replace_by_folder(_entry(s, 1)),
        False,
        "its entry is not a plain file",
    ),
    "entry writable": (
        lambda s: _entry(s, 1).chmod(0o620),
        False,
        "its entry can be written by others",
    ),
}


def _assert_refused_and_made_again(
    store: ArtifactStore, reason: str, *, culprit: Path | None
) -> None:
    (refusal,) = store.refusals
    assert refusal.key == key(1) and reason in refusal.reason
    assert not os.path.lexists(_entry(store, 1))
    assert culprit is None or not os.path.lexists(culprit)
    paths, made = store.get_or_make(key(1), facts(1), make=maker(1))
    assert made and read(paths) == contents(1)
    assert store.get(key(1), facts(1)) == paths and len(store.refusals) == 1
    assert read(store.get(key(4), facts(4))) == contents(4)  # shares a file with artifact 1
    assert store.verify() == []


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused_removed_and_made_again(
    case: str, store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    damage, object_goes, reason = DAMAGES[case]
    put(store, 1)
    put(store, 4)
    damage(store)
    with caplog.at_level(logging.WARNING, "polar_fx.store"):
        assert store.get(key(1), facts(1)) is None
    assert [reason in message and key(1)[:12] in message for message in caplog.messages] == [True]
    outside = store.root.parent / "outside.pt2"
    kept = outside.read_bytes() if outside.exists() else b""
    _assert_refused_and_made_again(store, reason, culprit=_object(store) if object_goes else None)
    assert not kept or outside.read_bytes() == kept


@pytest.mark.parametrize("which", ["entry", "object"])
def test_files_of_another_user_are_refused(
    which: str, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)
    put(store, 4)
    theirs, real = {"entry": _entry(store, 1), "object": _object(store)}[which], Path.lstat

    def lstat(path: Path) -> os.stat_result:
        status = real(path)
        return (
            os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))
            if path == theirs
            else status
        )

    monkeypatch.setattr(Path, "lstat", lstat)
    assert store.get(key(1), facts(1)) is None
    monkeypatch.undo()
    _assert_refused_and_made_again(store, "belongs to another user", culprit=theirs)


def test_the_caller_decides_which_facts_are_right(store: ArtifactStore) -> None:
    put(store, 1)
    assert store.get(key(1), facts(1) | {"torch": "2.12"}) is None
    assert "other facts: torch" in store.refusals[0].reason and store.entries() == []


@pytest.mark.parametrize("folder", [".", "entries", "objects", "tmp", "locks"])
def test_a_folder_that_others_can_write_to_is_not_used(folder: str, store: ArtifactStore) -> None:
    put(store, 1)
    (store.root / folder).chmod(0o770)
    for use in (lambda: store.get(key(1), facts(1)), lambda: put(store, 2), store.verify):
        with pytest.raises(
            CacheError,
            match=r"can be written by others; .*chmod -R go-w.*POLAR_FX_CACHE_DIR.*cache=False",
        ):
            use()


def test_a_linked_folder_of_objects_is_not_used(store: ArtifactStore) -> None:
    put(store, 1)
    shutil.move(_object(store).parent, store.root.parent / "outside")
    _object(store).parent.symlink_to(store.root.parent / "outside")
    with pytest.raises(CacheError, match="is not a folder"):
        store.get(key(1), facts(1))


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "artifacts").symlink_to(tmp_path / "disk")
    store = ArtifactStore(tmp_path / "artifacts", 0)
    put(store, 1)
    assert read(store.get(key(1), facts(1))) == contents(1) and store.verify() == []


def test_only_the_user_may_write_whatever_the_umask(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "cache" / "artifacts", 0)
    before = os.umask(0)
    try:
        put(store, 1)
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).parts: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    locks = {modes.pop(path) for path in list(modes) if path[-1].endswith(".lock")}
    assert not any(mode & 0o022 for mode in locks)
    assert {modes[p] for p in modes if (tmp_path / Path(*p)).is_dir()} == {0o700}
    assert {modes[p] for p in modes if (tmp_path / Path(*p)).is_file()} == {0o600}


# Verify, clear and leftovers


def test_verify_tells_and_repair_removes(store: ArtifactStore) -> None:
    for number in (1, 2, 4):
        put(store, number)
    _flip(store)
    _entry(store, 2).write_text("{")
    found = store.verify()
    assert Refusal(key(1), "code.pt2 is not what was stored") in found and {
        r.key for r in found
    } == {key(1), key(2)}
    assert store.verify() == found == store.verify(repair=True)  # only repair removes
    assert store.verify() == [] and [e.key for e in store.entries()] == [key(4)]
    assert len(_files(store)) == 3  # one entry, two objects


def test_leftovers_go_and_work_in_progress_stays(store: ArtifactStore) -> None:
    put(store, 1)
    orphan = store.root / "objects" / "00" / ("00" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"12345")
    killed = store.root / "tmp" / f"{key(5)}-x"
    (killed / "files").mkdir(parents=True)

    def make(folder: Path) -> None:
        maker(2)(folder)
        assert ArtifactStore(store.root).verify(repair=True) == []
        assert not orphan.exists() and not killed.exists()
        assert ArtifactStore(store.root).clear() == (1, store_bytes)

    store_bytes = total_bytes(store.entries())
    paths, _ = store.get_or_make(key(2), facts(2), make=make)
    assert read(paths) == contents(2) and [e.key for e in store.entries()] == [key(2)]


def test_clear(store: ArtifactStore) -> None:
    assert store.clear() == (0, 0) and not store.root.exists()
    for number in (1, 2, 4):
        put(store, number)
    day = 86400
    then = _entry(store, 1).stat().st_mtime - 3 * day
    os.utime(_entry(store, 1), (then, then))
    _entry(store, 2).write_text("{")
    # of the one that is damaged
    assert store.clear(unused_s=4 * day) == (0, len(contents(2)["code.pt2"]) + 20_000)
    # artifact 4 shares its table
    assert store.clear(unused_s=2 * day) == (1, len(contents(1)["code.pt2"]))
    assert read(store.get(key(4), facts(4))) == contents(4)
    assert store.clear() == (2, len(contents(4)["code.pt2"]) + 20_000)
    assert _files(store) == set()


# Room


def test_the_least_recently_used_go_first(store: ArtifactStore) -> None:
    store.limit_bytes = 3000
    keys = [_add(store, {"n": n}, data=bytes([n]) * 1000) for n in range(3)]
    assert [e.key for e in store.entries()] == keys
    store.get(keys[0], {"n": 0})
    keys.append(_add(store, {"n": 3}, data=bytes([3]) * 1000))
    assert [e.key for e in store.entries()] == [keys[2], keys[0], keys[3]]
    keys.append(_add(store, {"n": 4}, data=bytes([4]) * 1500))
    assert [e.key for e in store.entries()] == [keys[3], keys[4]]
    assert len(_files(store)) == 4 and store.verify() == []


def test_the_one_just_made_stays_whatever_its_size(store: ArtifactStore) -> None:
    store.limit_bytes = 3000
    _add(store, {"n": 0}, data=b"0" * 1000)
    big = _add(store, {"n": 1}, data=b"1" * 5000)
    assert [e.key for e in store.entries()] == [big] and store.get(big, {"n": 1})


def test_shared_objects_count_once_and_go_with_the_last(store: ArtifactStore) -> None:
    store.limit_bytes = 3000
    shared = b"s" * 2000
    one, two = (_add(store, {"n": n}, common=shared, own=bytes([n]) * 500) for n in range(2))
    assert total_bytes(store.entries()) == 3000 and len(store.entries()) == 2
    # frees 500 bytes of the first, as the second still needs the others
    _add(store, {"n": 2}, own=b"2" * 500)
    assert store.get(one, {"n": 0}) is None
    assert read(store.get(two, {"n": 1})) == {"common": shared, "own": b"\1" * 500}
    _add(store, {"n": 3}, common=shared, own=b"3" * 500)
    assert [e.facts["n"] for e in store.entries()] == [1, 3]
    # the 500 bytes of one are not enough; with the other go the shared ones
    _add(store, {"n": 4}, own=b"4" * 600)
    assert [e.facts["n"] for e in store.entries()] == [4]
    assert (
        total_bytes(store.entries())
        == 600
        == sum(p.stat().st_size for p in store.root.glob("objects/*/*"))
    )


def test_without_a_limit_nothing_goes(store: ArtifactStore) -> None:
    for number in range(5):
        put(store, number)
    assert len(store.entries()) == 5


LIMITS = {
    "0": 0,
    "1000": 1000,
    "500MB": 500_000_000,
    "4GiB": 2**32,
    " 1.5 kib ": 1536,
    "2tb": 2 * 10**12,
    "0.1B": 1,
    "": 2**32,
}


@pytest.mark.parametrize("text", LIMITS)
def test_limits(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_LIMIT", text)
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path))
    assert cache_limit_bytes() == LIMITS[text] == ArtifactStore().limit_bytes
    assert ArtifactStore().root == tmp_path / "artifacts"


@pytest.mark.parametrize("text", ["much", "-1", "4 G", "1e9", "5 MB!", "MB", "nan"])
def test_bad_limits_are_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_LIMIT", text)
    with pytest.raises(
        InputError, match=f"POLAR_FX_CACHE_LIMIT='{text}' is not a size.*KB, MB.*0 is no limit"
    ):
        ArtifactStore()
