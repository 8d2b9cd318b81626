"""Wrong values of every option of every command: a clean error, before any model is loaded."""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from polar_fx import cli, models
from polar_fx.backends import BACKENDS
from polar_fx.cli import checks, main
from polar_fx.errors import ModelNotFoundError

# What a command needs besides the option that is tried; {here} is a folder with small files.
NEEDED = {
    "run": ["--prompt", "x"],
    "chat": [],
    "inspect": [],
    "compile": [],
    "demo": [],
    "cache": ["ls"],
    "fit": ["--data", "{here}/text.txt", "--out", "{here}/fit"],
    "reproduce": ["{here}", "--out", "{here}/reproduction"],
    "search": ["--task", "addition", "--out", "{here}/out.jsonl"],
    "analyze": ["{here}/text.txt"],
    "train": ["{here}/text.txt", "--out", "{here}/predictor"],
    "evaluate": ["{here}", "--out", "{here}/report"],
    "exits": ["--data", "{here}/text.txt", "--out", "{here}/exits"],
    "export": ["--out", "{here}/bundle"],
    "bundle": ["show", "{here}"],
    "serve": ["{here}"],
    "bench": [],
    "families": [],
    "env": [],
}
WRONG = (
    "",
    "wrong",
    "-1",
    "1e999",
    "nan",
    "é" * 300,
    "{here}",
    "{here}/text.txt",
    "/nowhere/x",
)


def arguments() -> Iterator[tuple[str, argparse.Action]]:
    """Every argument of every command."""
    _, commands = cli._parser()
    for name, parser in commands.items():
        for action in parser._actions:
            if action.nargs != 0:  # switches have no value
                yield name, action


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text file; no model can be loaded, nothing starts, and no hub is asked."""

    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        raise ModelNotFoundError("no model is loaded in this test")

    for name in ("load", "load_default", "load_pretrained"):
        monkeypatch.setattr(models, name, stop)
    (tmp_path / "text.txt").write_text("this is no record\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return tmp_path


@pytest.mark.parametrize("command", NEEDED)
def test_wrong_values_are_refused_without_a_traceback(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = [action for name, action in arguments() if name == command]
    assert tried or command == "env"
    for action in tried:
        for value in WRONG:
            value = value.format(here=here)
            given = [part.format(here=here) for part in NEEDED[command]]
            if action.option_strings:
                given += [f"{action.option_strings[-1]}={value}"]
            else:  # "--" so that what begins with a dash is a value, too
                given = [*given[1:], "--", value] if given else ["--", value]
            try:
                status = main([command, *given])
            except SystemExit as stop:
                status = stop.code
            said = capsys.readouterr()
            assert status in (0, 1, 2), (command, given)
            if status == 2:
                assert "error: " in said.err, (command, given)


def test_every_command_is_tried() -> None:
    assert set(NEEDED) == set(cli.COMMANDS)
    assert len(list(arguments())) > 80


def test_names_are_refused_before_anything_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "config.json").write_text("{}")
    cases = {
        ("--program", "skip 30"): "from 0 to 29",
        ("--program", "skip five"): "^",
        ("--model", "/nowhere/x"): "there is no folder /nowhere/x",
        ("--model", str(here / "config.json")): f"--model {here}",
        ("--model", str(here / "x.gguf")): "no model is loaded in this test",
        ("--backend", "egaer"): "did you mean 'eager'?",
    }
    for given, message in cases.items():
        assert main(["run", "--prompt", "x", *given]) == 2
        assert message in capsys.readouterr().err, given


def test_a_text_for_an_unknown_depth_is_only_read() -> None:
    checks.check_programs(["skip 500", "0-6 /7", "identity", "(0-29)*40"], None)


def test_known_backends_are_those_of_the_library() -> None:
    assert set(checks.BACKENDS) == {"auto", *BACKENDS}


def test_misspelled_commands_and_options_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for given, meant in {
        ("serch",): "'search'",
        ("run", "--prompt", "x", "--progam", "identity"): "'--program'",
        ("inspect", "--dtype", "bloat16"): "'bfloat16'",
    }.items():
        with pytest.raises(SystemExit):
            main([*given])
        assert f"did you mean {meant}?" in capsys.readouterr().err
