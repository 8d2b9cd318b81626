"""A bundle is written whole or not at all: refusals, interruptions, full disks, and the command
line.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from polar_fx.bundle import BundleError, add_program, export, load_bundle, verify_bundle
from polar_fx.cli import export as command
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, ProgramError
from polar_fx.program import Program
from tiny_bundles import LENGTH, PROGRAMS, compiled_model, tokenizer_of_words
from tiny_models import make, prompts

# of the operating system, that an export takes
STEPS = ("fsync", "rename", "replace", "mkdir", "chmod")


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compiled_model()


# ----------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    eager = compile(make("llama"), "eager", max_length=LENGTH, cache=False)
    export(compiled, tmp_path / "one")
    bundle = load_bundle(tmp_path / "one")
    out = tmp_path / "bundle"
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (eager.library, {}, InputError, "takes what polar_fx.compile returns, got LayerLibrary"),
        (eager, {}, InputError, "backend 'eager' makes no code that can be shipped"),
        (bundle, {}, InputError, "is a bundle already; copy the folder"),
        (compiled, {"programs": ()}, InputError, "at least one program"),
        (compiled, {"programs": ["skip 9"]}, ProgramError, "9"),
        (compiled, {"programs": [Program.identity(5)]}, ProgramError, "depth 5"),
        (compiled, {"buckets": ()}, InputError, "buckets must be numbers of rows"),
        (compiled, {"buckets": (0,)}, InputError, "buckets must be numbers of rows"),
        (compiled, {"buckets": ("1",)}, InputError, "buckets must be numbers of rows"),
    ]
    for model, given, error, reason in refused:
        with pytest.raises(error, match=reason):
            export(model, out, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_what_is_there_is_not_replaced_unless_it_is_a_bundle_and_that_is_asked_for(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    place, other, link = tmp_path / "bundle", tmp_path / "other", tmp_path / "link"
    export(compiled, place, ["skip 1"])
    other.mkdir()
    link.symlink_to(place)
    (tmp_path / "file").touch()
    for out in (place, other, link, tmp_path / "file"):
        with pytest.raises(
            BundleError, match="exists already; name another folder, or say overwrite=True"
        ):
            export(compiled, out)
    for out in (other, link, tmp_path / "file"):
        with pytest.raises(BundleError, match="is no bundle, so it is not overwritten"):
            export(compiled, out, overwrite=True)
    with pytest.raises(BundleError, match=r"is in no folder that exists; make .*nowhere first"):
        export(compiled, tmp_path / "nowhere" / "bundle")
    running = load_bundle(place)
    export(compiled, f"{place}/", ["skip 2"], overwrite=True)
    assert load_bundle(place).programs == (Program.parse("skip 2", 4),)
    running.forward(torch.stack(prompts(5)))  # what was loaded needs its folder no more
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file", "link", "other"]


def test_a_tokenizer_with_files_of_its_own_is_refused(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    class Odd:
        def save_pretrained(self, place: Path) -> None:
            tokenizer_of_words().save_pretrained(place)
            (place / "tokenization_odd.py").write_text("print('hello')")

    with pytest.raises(InputError, match=r"saves tokenization_odd\.py, which a bundle cannot ship"):
        export(compiled, tmp_path / "bundle", tokenizer=Odd())
    assert list(tmp_path.iterdir()) == []


def test_files_are_for_those_who_run_the_bundle(compiled: CompiledModel, tmp_path: Path) -> None:
    """What the artifact store keeps for its owner alone is shipped with the usual modes; no path of
    this machine is told.
    """
    export(compiled, tmp_path / "bundle", tokenizer=tokenizer_of_words())
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    files = [p for p in (tmp_path / "bundle").rglob("*") if p.is_file()]
    assert {p.stat().st_mode for p in files} == {usual} and len(files) == 7 + 5 + 2
    for path in files:
        if path.suffix == ".json":
            assert (
                str(Path.home()) + "/" not in path.read_text()
                and str(tmp_path) not in path.read_text()
            )


# ------------------------------------------------------------------------------------ interruptions


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, BaseException], None]]:
    """Let the n-th step from now on raise; 0: none."""
    state: dict[str, Any] = {"at": 0, "seen": 0, "error": None}

    def counting(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            state["seen"] += 1
            if state["seen"] == state["at"]:
                raise state["error"]
            return step(*args, **kwargs)

        return run

    def arm(at: int, error: BaseException) -> None:
        state.update(at=at, seen=0, error=error)

    for name in STEPS:
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    yield arm
    arm(0, AssertionError())


def _whole_or_absent(place: Path) -> str | None:
    """The first program of the bundle there, which is whole; None if nothing is there."""
    return str(verify_bundle(place).programs[0]) if os.path.lexists(place) else None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["stop", "full"]
)
def test_an_export_that_fails_at_any_step_leaves_what_was_there_and_nothing_else(
    error: BaseException,
    overwrite: bool,
    compiled: CompiledModel,
    tmp_path: Path,
    interrupted: Callable[[int, BaseException], None],
) -> None:
    place = tmp_path / "out" / "bundle"
    place.parent.mkdir()
    if overwrite:
        export(compiled, place, ["skip 2"])
    step = 0
    for step in itertools.count(1):
        interrupted(step, error)
        try:
            export(compiled, place, ["skip 1"], overwrite=overwrite)
            break
        except KeyboardInterrupt:
            pass
        except BundleError as refusal:
            assert "No space left on device; free some space" in str(refusal)
        left = {p.name for p in place.parent.iterdir()}
        found = _whole_or_absent(place)
        # in its place already, but the place itself could not be made durable
        if found == "0 2-3 /4":
            assert step > 20
            shutil.rmtree(place)
            interrupted(0, error)
            if overwrite:
                export(compiled, place, ["skip 2"])
        else:
            assert found == ("0-1 3 /4" if overwrite else None)
        assert left == ({"bundle"} if found else set()), "nothing is left beside"
    assert step > 20 and _whole_or_absent(place) == "0 2-3 /4"


def _rename_but_not_back(rename: Callable[[Any, Any], None], one: Path, two: Path) -> None:
    if not str(one).endswith(".former"):
        rename(one, two)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_that_ends_at_any_step_leaves_no_half_bundle_under_the_name(
    overwrite: bool,
    compiled: CompiledModel,
    tmp_path: Path,
    interrupted: Callable[[int, BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if killed: nothing is cleaned up or put back afterwards."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    class Killed(BaseException):
        pass

    rmtree, seen = shutil.rmtree, set()
    step = 0
    for step in itertools.count(1):
        place = tmp_path / str(step) / "bundle"
        place.parent.mkdir()
        interrupted(0, Killed())
        if overwrite:
            export(compiled, place, ["skip 2"])
        with monkeypatch.context() as patch:
            interrupted(step, Killed())
            patch.setattr(shutil, "rmtree", lambda *a, **k: None)
            patch.setattr(os, "rename", functools.partial(_rename_but_not_back, os.rename))
            try:
                export(compiled, place, ["skip 1"], overwrite=overwrite)
                break
            except Killed:
                pass
        found = _whole_or_absent(place)
        seen.add(found)
        if found is None and overwrite:  # between two renames: the former bundle is beside
            (former,) = place.parent.glob(".bundle.*.former")
            assert str(verify_bundle(former).programs[0]) == "0-1 3 /4"
        rmtree(place.parent)
    assert step > 20 and seen == (
        {"0-1 3 /4", None, "0 2-3 /4"} if overwrite else {None, "0 2-3 /4"}
    )


def test_a_disk_without_room_is_refused_before_anything_is_written(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        BundleError,
        match=r"has 1\.0 MB left, and the bundle takes \d\d\.\d MB; free some space there",
    ):
        export(compiled, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_within_the_weights_is_an_error_that_says_so(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("polar_fx.bundle.writer.save_file", full)
    with pytest.raises(
        BundleError,
        match=r"weights\.safetensors: cannot be written: .*No space left .*; free some space there",
    ):
        export(compiled, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_hold_what_was_written_is_noticed_before_the_bundle_has_its_name(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(place: Path, manifest: Any) -> None:
        write_manifest(place, manifest)
        os.truncate(place / "weights.safetensors", 100)

    from polar_fx.bundle.manifest import write_manifest

    monkeypatch.setattr("polar_fx.bundle.writer.write_manifest", lossy)
    with pytest.raises(BundleError, match=r"weights\.safetensors: is truncated"):
        export(compiled, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "polar_fx.bundle.writer.verify_bundle", lambda place: (tmp_path / "bundle").mkdir()
    )
    with pytest.raises(BundleError, match="exists already"):
        export(compiled, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"] and list(
        (tmp_path / "bundle").iterdir()
    ) == []


def test_programs_that_are_added_at_the_same_time_are_all_there(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    export(compiled, tmp_path / "bundle")
    texts = [" ".join(map(str, p)) for p in itertools.permutations(range(4)) if p != (0, 1, 2, 3)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: add_program(tmp_path / "bundle", text), texts))
    assert len(verify_bundle(tmp_path / "bundle").programs) == 24


# ------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    make("llama").save_pretrained(place)
    tokenizer_of_words().save_pretrained(place)
    return place


def _command(*arguments: str, as_json: bool = False) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.execute(argparse.Namespace(**vars(parser.parse_args(arguments)), json=as_json))


def test_the_command_writes_a_bundle_of_texts_and_files(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "menu.txt").write_text("# what was found\nskip 1   # fast\n\n0 (1-2)*2@0.5 3\n")
    given = (
        "--out",
        str(tmp_path / "bundle"),
        "--model",
        str(model_folder),
        "--max-length",
        str(LENGTH),
    )
    result = _command(*given, "--programs", "identity", str(tmp_path / "menu.txt"))
    printed = capsys.readouterr().out
    assert json.loads(json.dumps(result)) == result
    assert result["manifest"] == json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert (
        "3 programs, " in printed
        and " MB" in printed
        and "7 compiled regions" in printed
        and result["fingerprint"] in printed
    )
    bundle = load_bundle(tmp_path / "bundle", fingerprint=result["fingerprint"])
    assert bundle.programs == tuple(map(bundle.resolve, PROGRAMS))
    assert bundle.tokenizer("w5").input_ids == [5]
    with pytest.raises(BundleError, match="exists already"):
        _command(*given)
    _command(*given, "--overwrite", "--no-tokenizer", as_json=True)
    assert (
        load_bundle(tmp_path / "bundle").programs == (Program.identity(4),)
        and capsys.readouterr().out == ""
    )


def test_the_command_refuses_what_it_cannot_use_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    given = ("--out", str(tmp_path / "bundle"), "--model", str(tmp_path / "no-model"))
    for more, error, reason in (
        (
            ("--programs", str(tmp_path / "empty.txt")),
            InputError,
            "holds no program; write one a line",
        ),
        (("--programs", str(tmp_path / "binary")), InputError, "cannot be read"),
        (("--backend", "eager"), InputError, "--backend eager makes no code that can be shipped"),
        (("--out", str(tmp_path)), BundleError, "exists already"),
        (
            ("--out", str(tmp_path), "--overwrite"),
            BundleError,
            "is no bundle, so it is not overwritten",
        ),
    ):
        with pytest.raises(error, match=reason):
            _command(*given, *more)
