"""Remedies of the library name options where a command says them."""

import argparse
import shlex
from pathlib import Path

import pytest

from polar_fx.cli import main
from polar_fx.cli.messages import in_options, next_command

EXPORT = argparse.Namespace(
    backend=None, dtype=None, max_length=None, overwrite=None, no_tokenizer=None, workers=1
)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("or say overwrite=True", "or say --overwrite"),
        ("compile with max_length=512 or more", "compile with --max-length 512 or more"),
        ("use backend='eager' and report", "use --backend eager and report"),
        ("give dtype=, or lower max_length", "give --dtype, or lower --max-length"),
        ("export without tokenizer= for", "export with --no-tokenizer for"),
        ("compile with max_length=7.", "compile with --max-length 7."),
        # no such option here, a plain word, part of a name, an option of another meaning
        ("quantize='int8' and a dtype of device 1", "quantize='int8' and a dtype of device 1"),
        ("my_max_length=3, overwrite==True", "my_max_length=3, overwrite==True"),
        ("compile with workers=0", "compile with workers=0"),
    ],
)
def test_arguments_become_options(message: str, shown: str) -> None:
    assert in_options(message, EXPORT) == shown


def test_a_folder_that_is_there_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "or say --overwrite\n" in shown and "=True" not in shown


def test_commands_to_go_on_with_can_be_pasted() -> None:
    given = argparse.Namespace(data=[Path("my questions.jsonl"), Path("b")], model=None, top_p=0.9)
    line = next_command("run", "a predictor", options=given, same=("data", "model", "top_p"))
    words = ["run", "a predictor", "--data", "my questions.jsonl", "--data", "b", "--top-p", "0.9"]
    assert shlex.split(line) == ["python", "-m", "polar_fx", *words]


def test_paths_and_what_no_option_says_stay() -> None:
    options = argparse.Namespace(max_length=None, overwrite=False)
    for text in ("cannot read runs/max_length/rows.jsonl", "overwrite=False is meant"):
        assert in_options(text, options) == text
