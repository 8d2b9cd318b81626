"""`polar_fx cache`: what it shows, checks and removes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from places import ROOT
from polar_fx.cli import main
from polar_fx.output.digest import digest
from polar_fx.output.files import write_file
from polar_fx.store import ArtifactStore

FACTS: list[dict[str, Any]] = [
    {
        "kind": "layer",
        "body": "layer_kind_0",
        "graph": "a" * 64,
        "bucket": "[1, T]",
        "backend": "inductor",
        "device": "cpu",
        "dtype": "float32",
        "torch": "2.13.0",
    },
    {"kind": "epilogue", "bucket": "[1, 1]", "backend": "inductor"},
]
KEYS = [digest(facts) for facts in FACTS]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """Two artifacts in the folder the commands use; the first one was last used ten days ago."""
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("POLAR_FX_CACHE_LIMIT", "2GB")
    monkeypatch.setenv("COLUMNS", "120")
    store = ArtifactStore()
    for key, facts, size in zip(KEYS, FACTS, (2_500_000, 700), strict=True):
        store.get_or_make(
            key,
            facts,
            make=lambda folder, size=size: write_file(folder / "code.pt2", bytes(size)),
        )
    entry = _entry(store, 0)
    then = entry.stat().st_mtime - 10 * 86400
    os.utime(entry, (then, then))
    return store


def _entry(store: ArtifactStore, index: int) -> Path:
    return store.root / "entries" / f"{KEYS[index]}.json"


def _json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["cache", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def _answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    terminal = io.StringIO(text)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)


def test_ls_shows_artifacts_and_totals(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "ls"]) == 0
    out = capsys.readouterr().out
    (layer,) = [line for line in out.splitlines() if KEYS[0][:12] in line]
    (epilogue,) = [line for line in out.splitlines() if KEYS[1][:12] in line]
    for part in ("layer layer_kind_0", "inductor cpu float32", "[1, T]", "2.5 MB", "10 d"):
        assert part in layer
    for part in ("epilogue", "inductor", "[1, 1]", "700 B", " s "):
        assert part in epilogue
    assert out.index(KEYS[1][:12]) < out.index(KEYS[0][:12])  # the last used first
    assert f"2 artifacts, 2.5 MB of 2.0 GB, in {store.root}" in out


def test_ls_as_json_has_everything(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _json(capsys, "ls")
    assert (result["folder"], result["limit_bytes"], result["bytes"]) == (
        str(store.root),
        2 * 10**9,
        2_500_700,
    )
    assert [(a["key"], a["facts"], a["files"]) for a in result["artifacts"]] == [
        (KEYS[1], FACTS[1], {"code.pt2": 700}),
        (KEYS[0], FACTS[0], {"code.pt2": 2_500_000}),
    ]


def test_nothing_there_is_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setenv("POLAR_FX_CACHE_LIMIT", "0")
    assert main(["cache", "ls"]) == 0
    assert "0 artifacts, 0 B and no limit" in capsys.readouterr().out
    assert (
        _json(capsys, "verify", "--repair")["fine"]
        == 0
        == _json(capsys, "clear", "--yes")["removed"]
    )
    assert not (tmp_path / "new").exists()


def test_verify_fails_until_it_is_repaired(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _json(capsys, "verify") == {
        "folder": str(store.root),
        "ok": True,
        "repaired": False,
        "fine": 2,
        "refused": [],
    }
    _entry(store, 1).write_text("{}")
    assert main(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert f"{KEYS[1][:12]}: its entry is malformed" in out
    assert "1 artifact fit for use, 1 not; `cache verify --repair`" in out
    (refused,) = _json(capsys, "verify", status=1)["refused"]
    assert refused["key"] == KEYS[1]
    assert main(["cache", "verify", "--repair"]) == 0
    assert "1 artifact fit for use, 1 not, and removed" in capsys.readouterr().out
    assert _json(capsys, "verify")["fine"] == 1


def test_clear_removes_all_or_the_old(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _json(capsys, "clear", "--yes", "--older-than", "11")["removed"] == 0
    result = _json(capsys, "clear", "--yes", "--older-than", "9")
    assert (result["removed"], result["bytes"]) == (1, 2_500_000)
    assert [e.key for e in store.entries()] == [KEYS[1]]
    assert main(["cache", "clear", "--yes"]) == 0
    removed = "removed 1 artifact, 700 B; 0 converted models, 0 B\n"
    assert capsys.readouterr().out == removed and store.entries() == []


@pytest.mark.parametrize(
    ("answer", "left"), [("y\n", 0), ("Yes\n", 0), ("n\n", 2), ("\n", 2), ("", 2)]
)
def test_clear_asks(
    answer: str,
    left: int,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _answer(monkeypatch, answer)
    assert main(["cache", "clear"]) == 0
    shown = capsys.readouterr()
    assert (
        f"remove the artifacts in {store.root} and the converted models in" in shown.err
        and f"removed {2 - left} " in shown.out
    )
    assert len(store.entries()) == left


@pytest.fixture
def models(store: ArtifactStore) -> Path:
    """Two converted models, one in the making, and the locks of all; one was used long ago."""
    folder = store.root.parent / "models"
    for name, age_days in (("new", 0), ("old", 20)):
        (folder / name).mkdir(parents=True)
        file = folder / name / "model.safetensors"
        file.write_bytes(bytes(2_000))
        then = file.stat().st_mtime - age_days * 86400
        os.utime(file, (then, then))
        (folder / f"{name}.lock").touch()
    (folder / ".half.1234").mkdir()
    return folder


def test_converted_models_are_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == 0
    shown = capsys.readouterr().out
    assert f"2 converted models, 4.0 kB, in {models}" in shown and "2 artifacts" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("old ")]
    assert "2.0 kB" in line and "used 20 d ago" in line
    assert main(["cache", "ls", "--only", "models"]) == 0
    assert "artifacts" not in capsys.readouterr().out
    only = _json(capsys, "ls", "--only", "artifacts")
    assert only["models"] == [] and len(only["artifacts"]) == 2


def test_converted_models_are_cleared(
    models: Path, store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _json(capsys, "clear", "--yes", "--only", "models", "--older-than", "19")
    assert [model["name"] for model in result["models"]] == ["old"]
    with FileLock(f"{models / 'new'}.lock"):  # somebody converts it now
        assert _json(capsys, "clear", "--yes", "--only", "models")["models"] == []
    assert (models / "new").is_dir() and len(store.entries()) == 2
    assert main(["cache", "clear", "--yes"]) == 0
    assert "removed 2 artifacts, 2.5 MB; 1 converted model, 2.0 kB" in capsys.readouterr().out
    assert sorted(p.name for p in models.iterdir()) == [".half.1234", "new.lock", "old.lock"]


def test_clear_does_not_guess_where_nobody_can_answer(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["cache", "clear"]) == 2
    assert "--yes" in capsys.readouterr().err and len(store.entries()) == 2


BAD = {
    "repair": (["ls", "--repair"], "--repair belongs to `cache verify`, not to `cache ls`"),
    "older": (["verify", "--older-than", "3"], "--older-than belongs to `cache clear`"),
    "only": (["verify", "--only", "models"], "--only belongs to `cache ls and clear`"),
    "yes": (["ls", "--yes"], "--yes belongs to `cache clear`"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_of_other_actions_are_refused(
    case: str, store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    assert main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_bad_limit_is_one_message(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_LIMIT", "plenty")
    assert main(["cache", "ls"]) == 2
    shown = capsys.readouterr()
    assert (
        shown.out == ""
        and "POLAR_FX_CACHE_LIMIT='plenty'" in shown.err
        and "Traceback" not in shown.err
    )


def test_the_cache_commands_need_no_torch(store: ArtifactStore) -> None:
    code = (
        "import sys, polar_fx.cli as c\n"
        "for a in ('ls', 'verify'): assert c.main(['cache', a]) == 0\n"
        "assert c.main(['cache', 'clear', '--yes']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
