"""Bundles of a model whose layers read the keys and values of others: in Python and in C++."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cpp_runner import comma, cpp_tokens, python_tokens, run_cpp
from polar_fx.bundle import add_program, export, load_bundle, read_manifest
from polar_fx.bundle.errors import BundleError
from polar_fx.bundle.manifest import SHARING_FORMAT
from polar_fx.errors import ProgramError
from shared_kv import OWNERS, sharing_compiled_to_files, sharing_logits
from tiny_bundles import Mutable
from tiny_models import prompts

PROGRAMS = ("identity", "0 1 2 (1 4)*2@0.5 2", "0 1")
pytestmark = pytest.mark.slow  # many regions are compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shared") / "bundle"
    export(sharing_compiled_to_files(), place, PROGRAMS)
    return place


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Mutable:
    """One to be damaged."""
    return Mutable(shutil.copytree(folder, tmp_path / "bundle"))


def test_programs_run_as_a_plain_loop_and_in_cpp(runner: Path, folder: Path) -> None:
    """Programs that end in layers that only read, which run for one token, in one cut to its keys
    and values before these, and with a repeat of owners and readers.
    """
    loaded = load_bundle(folder)
    for text, row in zip(PROGRAMS, prompts(20, 9, 3), strict=True):
        program = loaded.resolve(text)
        logits = loaded.forward(row[None], program=program)[0]
        torch.testing.assert_close(logits, sharing_logits(program, row), rtol=0, atol=1e-4)
        arguments = ("--tokens", comma(row.tolist()), "--new", 8, "--program", str(program))
        got = cpp_tokens(runner, folder, *arguments)
        assert got == python_tokens(loaded, text, prompt=row.tolist(), new=8)


def test_programs_that_skip_an_owner_are_refused(runner: Path, folder: Path) -> None:
    loaded = load_bundle(folder, any_program=True)
    says = "layer 2 reads the keys and values of layer 0"
    with pytest.raises(ProgramError, match=says):
        loaded.forward(torch.tensor([[5]]), program="1 2")
    refused = run_cpp(runner, folder, "--tokens", "5", "--any-program", "--program", "1 2")
    assert refused.returncode == 2 and f"{says}, which it skips before" in refused.stderr


def test_such_programs_are_not_added(copied: Mutable) -> None:
    add_program(copied.folder, "0 2", default=True)
    before = copied.manifest()
    with pytest.raises(ProgramError, match="keep layer 1 before layer 3"):
        add_program(copied.folder, "0 3")
    assert copied.manifest() == before
    copied.sign({**before, "programs": ["0 3 /5"]})
    with pytest.raises(BundleError, match=r"symbols.json: does not fit a program of the manifest"):
        load_bundle(copied.folder)


def test_a_second_start_traces_and_compiles_nothing(folder: Path) -> None:
    again = sharing_compiled_to_files()
    program = again.resolve(PROGRAMS[1])
    row = prompts(9)[0]
    logits = again.forward(row[None], program=program)[0]
    torch.testing.assert_close(logits, sharing_logits(program, row), rtol=0, atol=1e-4)
    assert {r.source for r in again.regions.records} == {"loaded"} and not again.library.is_traced
    assert again.library.table.owners == OWNERS


def test_readers_of_before_are_told_by_the_format(folder: Path) -> None:
    assert read_manifest(folder).version == SHARING_FORMAT


@pytest.mark.parametrize(
    ("owners", "says"),
    [
        ({"2": 0, "3": 1, "4": 2}, "layer 4 read the slot of layer 2"),
        ({"2": 3}, "layer 2 read the slot of layer 3"),
        ({"1": 0}, "layer 1 read the slot of layer 0"),
        ({"7": 0}, "layer 7 read the slot of layer 0"),
    ],
)
def test_owners_that_make_no_sense_are_refused(
    owners: dict[str, int], says: str, runner: Path, copied: Mutable
) -> None:
    copied.forge("symbols.json", _with(copied.folder, owners))
    with pytest.raises(BundleError, match=says):
        load_bundle(copied.folder)
    refused = run_cpp(runner, copied.folder, "--tokens", "5")
    assert refused.returncode == 2 and says in refused.stderr


def test_an_older_format_has_no_owners(copied: Mutable) -> None:
    copied.sign({**copied.manifest(), "polar_fx_bundle": SHARING_FORMAT - 1})
    with pytest.raises(BundleError, match="read the slots of others, which format 2 has not"):
        load_bundle(copied.folder)


def _with(folder: Path, owners: Any) -> bytes:
    table = json.loads((folder / "symbols.json").read_text())
    return json.dumps({**table, "owners": owners}, indent=1).encode()
