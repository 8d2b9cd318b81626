"""Files and folders that are replaced whole: what a reader finds, and what is left."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from polar_fx.errors import InputError
from polar_fx.output.files import made_folder, replace_file, replacing, write_whole


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as work:
        assert work.parent == tmp_path and not work.exists()
        work.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_its_name_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replacing(path) as work:
        (work / "inner").mkdir(parents=True)
        (work / "inner" / "file").write_bytes(b"1")
        assert not path.exists()
    assert (path / "inner" / "file").read_bytes() == b"1" and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_raises_inside_leaves_the_old_one_alone(is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "place"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as work:
            if is_folder:
                work.mkdir()
            (work / "file" if is_folder else work).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_one_alone(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, [b"n", b"ew"])
    with pytest.raises(InputError, match="cannot write .*No space left on device; name a file"):
        write_whole(b"new", path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_file_system_that_does_not_sync_folders_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def only_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    replace_file(tmp_path / "file", [b"n", b"ew"])
    assert (tmp_path / "file").read_bytes() == b"new"


def test_what_is_written_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    replace_file(tmp_path / "file", [b"1"])
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    assert made_folder(tmp_path / "a" / "b").is_dir() and made_folder(tmp_path / "a").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*file/inner: Not a directory"):
        made_folder(tmp_path / "file" / "inner")
