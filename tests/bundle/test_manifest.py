"""Programs added to and removed from a bundle: nothing but its manifest is rewritten."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from polar_fx.bundle import (
    BundleError,
    add_program,
    load_bundle,
    read_manifest,
    remove_program,
)
from polar_fx.errors import ProgramError
from polar_fx.program import Program
from tiny_bundles import DEPTH, PROGRAMS
from tiny_models import prompts


@pytest.fixture
def copied(whole_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, whose manifest may be edited."""
    return shutil.copytree(
        whole_bundle, tmp_path / "bundle", copy_function=lambda a, b: Path(b).hardlink_to(a)
    )


def _all_but_the_manifest(place: Path) -> dict[str, Any]:
    files = {p: p.stat() for p in place.rglob("*") if p.is_file() and p.name != "manifest.json"}
    return {str(p): (s.st_ino, s.st_mtime_ns, s.st_size) for p, s in files.items()}


def test_programs_are_added_and_removed_by_editing_the_manifest_alone(copied: Path) -> None:
    before, fingerprint = _all_but_the_manifest(copied), read_manifest(copied).fingerprint
    added = add_program(copied, "skip 2")
    assert [str(p) for p in added.programs] == [
        "0-3 /4",
        "0 2-3 /4",
        "0 (1-2)*2@0.5 3 /4",
        "0-1 3 /4",
    ]
    assert add_program(copied, Program.parse("skip 2", DEPTH)) == added, "it is there"
    (row,) = prompts(5)
    load_bundle(copied).forward(row[None], program="skip 2")
    assert remove_program(copied, "identity").programs == added.programs[1:]
    assert load_bundle(copied).default_program == Program.parse("skip 1", DEPTH)
    add_program(copied, "skip 2", default=True)
    assert load_bundle(copied).default_program == Program.parse("skip 2", DEPTH)
    assert load_bundle(copied, fingerprint=fingerprint).manifest.fingerprint == fingerprint
    names = {
        "manifest.json",
        "weights.safetensors",
        "symbols.json",
        "config.json",
        "generation.json",
        "regions",
        "tokenizer",
    }
    assert _all_but_the_manifest(copied) == before and {p.name for p in copied.iterdir()} == names


def test_programs_that_cannot_be_added_or_removed_leave_the_manifest_alone(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (copied / "manifest.json").read_bytes()
    for edit, error, words in (
        (lambda: add_program(copied, "0-4 /5"), ProgramError, "5"),
        (
            lambda: add_program(copied, Program.identity(5)),
            ProgramError,
            "depth 5 but the bundle has 4 layers",
        ),
        (lambda: remove_program(copied, "skip 3"), BundleError, "holds no program"),
        (lambda: add_program(copied.parent, "skip 3"), BundleError, r"manifest.json: is missing"),
        (lambda: add_program(copied / "nowhere", "skip 3"), BundleError, "is not a folder"),
    ):
        with pytest.raises(error, match=words):
            edit()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", _no_space)
        with pytest.raises(
            BundleError, match=r"manifest.json: cannot be written: .*; free some space"
        ):
            add_program(copied, "skip 3")
    assert (copied / "manifest.json").read_bytes() == text and len(list(copied.iterdir())) == 7
    for program in PROGRAMS[1:]:
        remove_program(copied, program)
    with pytest.raises(BundleError, match="is its only program; add another one first"):
        remove_program(copied, "identity")


def _no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")
