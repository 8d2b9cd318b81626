"""The scripts of docs/examples run, on a tiny model."""

import runpy
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from places import ROOT
from polar_fx.bundle import verify_bundle
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion
from polar_fx.store import ArtifactStore
from portable_regions import use_graphs
from tiny_search import save_tiny

EXAMPLES = ROOT / "docs" / "examples"
DEPTH = 5  # of which four steps are shared by the programs of a menu
Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), DEPTH)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path) -> Run:
    """Runs an example on the tiny model; returns the lines it printed."""

    def script(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, str(model), *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return script


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Regions are interpreted graphs, in a store of their own."""
    use_graphs(monkeypatch, tmp_path / "cache")


def test_every_example_is_short_and_run_here() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    here = Path(__file__).read_text(encoding="utf-8")
    assert len(scripts) == 5
    assert all(f'run("{name}"' in here for name in scripts)
    assert max(len(text.splitlines()) for text in scripts.values()) < 60


def test_skip_layers(run: Run) -> None:
    lines = run("skip_layers.py")
    assert [line.split()[0] for line in lines[:4]] == ["identity", "skip", "skip", "repeat"]
    texts = [line.partition("'")[2].rstrip("'") for line in lines[:2]]
    assert len(set(texts)) == 2 and all(text in lines[4] for text in texts)


def test_time_programs(run: Run) -> None:
    lines = run("time_programs.py", "eager")
    assert [line.split(" steps")[0].split()[-1] for line in lines[1:]] == ["5", "3", "7"]


@pytest.fixture
def answerable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights answer nothing, so which program answers a question is said here."""
    right = [Program.parse(text, DEPTH) for text in ("identity", "skip 4", "repeat 4")]

    def evaluate(self: Any, pairs: Sequence[tuple[EncodedQuestion, Program]]) -> list[Verdict]:
        found = [p == right[zlib.crc32(q.id.encode()) % len(right)] for q, p in pairs]
        return [Verdict(yes, -0.1 if yes else -4.0, 1.0 if yes else -1.0) for yes in found]

    monkeypatch.setattr(TeacherForcing, "evaluate", evaluate)


@pytest.mark.usefixtures("answerable")
def test_search_to_predictor(run: Run, tmp_path: Path) -> None:
    lines = run("search_to_predictor.py", tmp_path / "out", "eager")
    assert lines[0].startswith("24 questions: ") and "menu:" in lines
    assert "'reason': 'policy'" in lines[-1]


@pytest.mark.usefixtures("without_compiler")
def test_bundle_and_serve(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    monkeypatch.setattr(subprocess, "check_call", started.append)
    lines = run("bundle_and_serve.py", tmp_path / "bundle")
    manifest = verify_bundle(tmp_path / "bundle")
    assert len(manifest.programs) == 3
    for line, program in zip(lines[1:], manifest.programs, strict=True):
        assert line.split()[0] == str(program).removesuffix(f" /{DEPTH}").split()[0]
    assert started[0][1:4] == ["-m", "polar_fx", "serve"]
    assert started[0][-1] == manifest.fingerprint


@pytest.mark.usefixtures("without_compiler")
def test_own_pass(run: Run, tmp_path: Path) -> None:
    lines = run("own_pass.py")
    assert "layer_kind_0 {'squares replaced': 2}" in lines
    assert float(lines[-1].split()[-1]) < 1e-4
    entries = ArtifactStore(tmp_path / "cache" / "artifacts").entries()
    assert any("region" in str(entry.facts["kind"]) for entry in entries)
