"""Help, completion and commands that only look at files, where torch cannot be imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT
from polar_fx.cli import COMMANDS

pytestmark = pytest.mark.child_process

HELP = """
import contextlib, io
from polar_fx.cli import COMMANDS, main
for command in COMMANDS:
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            main([command, "--help"])
    except SystemExit as end:
        assert not end.code, command
    print(command, len(shown.getvalue()))
"""


def run(*arguments: str, without: Path, **more: str) -> str:
    """What a process of its own prints, in which torch and transformers raise ImportError; `more`
    is put into its environment.
    """
    for name in ("torch", "transformers"):
        (without / f"{name}.py").write_text("raise ImportError('not to be imported')\n")
    paths = os.pathsep.join((str(without), str(ROOT)))
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **more},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_help_is_shown(tmp_path: Path) -> None:
    shown = dict(line.split() for line in run("-c", HELP, without=tmp_path).splitlines())
    assert set(shown) == set(COMMANDS) and min(map(int, shown.values())) > 200


def test_a_bundle_is_shown_and_its_programs_changed(tmp_path: Path) -> None:
    bundle = shutil.copytree(ROOT / "tests" / "data" / "former" / "bundle", tmp_path / "bundle")
    command = ("-m", "polar_fx", "bundle")
    assert "the first by default" in run(*command, "show", str(bundle), without=tmp_path)
    assert "+ 0-2 /4" in run(*command, "add", str(bundle), "skip 3", without=tmp_path)


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("polar-fx anal", ["analyze "]),
        ("polar-fx run --pro", ["--prompt", "--program"]),
        ("polar-fx cache clear --only m", ["models "]),
    ],
)
def test_a_shell_completes(line: str, completed: list[str], tmp_path: Path) -> None:
    run(
        "-m",
        "polar_fx",
        without=tmp_path,
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "found"),
        _ARGCOMPLETE_IFS="\n",
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
    )
    assert (tmp_path / "found").read_text().splitlines() == completed
