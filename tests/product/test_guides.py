"""What guides name is there: switches, loggers, errors, and the files that the map leads to."""

import importlib
import inspect
import os
import re
from pathlib import Path

import pytest

import polar_fx
from places import ROOT, TESTS
from polar_fx import environment
from polar_fx.environment import (
    cache_dir,
    cache_limit_bytes,
    environment_variables,
    log_level,
    park_waiting_threads,
)

DEBUGGING = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = CONTRIBUTING.partition("## To change X")[2].partition("## Words")[0]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [list(map(str.strip, line.strip("|").split("|"))) for line in lines[2:]]


def test_loggers_are_those_of_the_code() -> None:
    named = {row[0].strip("`") for row in rows(DEBUGGING, "Loggers")}
    found = set()
    for path in (*(ROOT / "polar_fx").rglob("*.py"), *(ROOT / "passes").glob("*.py")):
        for given in re.findall(r"getLogger\(([^)]*)\)", path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.add(module if given == "__name__" else given.strip('"'))
    assert named == {name for name in found if name.startswith("polar_fx.")}


def test_switches_are_options_of_compile() -> None:
    options = inspect.signature(polar_fx.compile).parameters
    switches = [row[1] for row in rows(DEBUGGING, "One off switch a stage")]
    named = {name for text in switches for name in re.findall(r"`(\w+)=", text)}
    assert len(switches) > 8 and named - options.keys() <= {"program"}


def test_errors_are_there() -> None:
    named = re.findall(r"^\| `(\w+(?:Error|Warning))`", DEBUGGING, flags=re.MULTILINE)
    assert len(named) > 10
    missing = [name for name in named if not hasattr(polar_fx, name)]
    assert sorted(missing) == ["CompileError", "RecordFileError", "TrainingError"]
    assert all(hasattr(polar_fx.errors, name) for name in missing)


def test_environment_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [row[0].strip("`") for row in rows(DEBUGGING, "Environment")]
    assert names == ["POLAR_FX_CACHE_DIR", "POLAR_FX_CACHE_LIMIT", "POLAR_FX_LOG"]
    monkeypatch.setenv(names[0], str(tmp_path))
    monkeypatch.setenv(names[1], "1000")
    monkeypatch.setenv(names[2], "Info")
    assert cache_dir() == tmp_path and cache_limit_bytes() == 1000 and log_level() == 20
    assert {*names} <= environment_variables().keys()
    monkeypatch.setenv(names[2], "loud")
    with pytest.raises(polar_fx.PolarError, match="use one of debug, info, warning, error"):
        log_level()


def test_threads_are_parked_beside_others_unless_the_user_said_how_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tmp_path / "loadavg"
    monkeypatch.setattr(environment, "_RUNNABLE", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    load.write_text("9.00 9.00 9.00 4/300 1234\n")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setattr(os, "environ", {name: "given"})
        park_waiting_threads()
        assert os.environ == {name: "given"} and name in DEBUGGING
    monkeypatch.setattr(os, "environ", {})
    park_waiting_threads()
    assert os.environ == {"OMP_WAIT_POLICY": "passive"}
    os.environ.clear()
    load.write_text("9.00 9.00 9.00 2/300 1234\n")
    park_waiting_threads()
    assert not os.environ, "one other thread for four cores"
    load.unlink()
    park_waiting_threads()
    assert not os.environ


def test_the_map_leads_to_files() -> None:
    file = re.compile(r"`((?:polar_fx|passes|bench|docs|tests)/(?:[\w/]*/|[\w/]*\.\w+)?)`")
    named = set(file.findall(CONTRIBUTING))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]


def test_ways_through_the_code_name_what_is_there() -> None:
    steps = [
        pair
        for row in rows(CONTRIBUTING, "Three ways through the code")
        for pair in re.findall(r"`(polar_fx/[\w/]+)\.py` `([\w.]+)`", row[1])
    ]
    assert len(steps) == 12
    for file, name in steps:
        found = importlib.import_module(file.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_the_map_names_tests_to_run() -> None:
    lines = [line for line in MAP.splitlines() if line.startswith("| ")][1:]
    named = [name for line in lines for name in re.findall(r"`([\w/]+\*?)`", line.split("|")[3])]
    assert len(named) > 30
    for name in named:
        folder, _, file = name.rpartition("/")
        files = list((TESTS / folder).glob(f"test_{file}.py"))
        assert files or (TESTS / name).is_dir(), name


def test_every_room_is_in_the_map() -> None:
    rooms = {
        path.name for path in (ROOT / "polar_fx").iterdir() if (path / "__init__.py").is_file()
    }
    assert not [room for room in rooms - {"passes"} if f"polar_fx/{room}/" not in MAP]


def test_quick_tests_are_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = text.partition("FAST := ")[2].partition("\n\n")[0].replace("\\", "").split()
    assert len(names) > 20
    for name in names:
        folder, _, file = name.rpartition("/")
        assert (TESTS / folder / f"test_{file}.py").is_file(), name
