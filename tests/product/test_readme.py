"""Every Python block of the README runs, in order, in one namespace, and prints what the text block
after it shows; commands print what stands under them. So does the notebook of the examples.
"""

import ast
import contextlib
import doctest
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import first_picture
from places import ROOT
from polar_fx.cli import main, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<shown>.*?)```\n)?", re.DOTALL)
COMMANDS = re.compile(r"```console\n(.*?)```\n", re.DOTALL)


def same(want: str, got: str) -> bool:
    """Whether this was printed; `...` stands for anything, and lines may be wrapped."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(want, got, flags)


@dataclass(frozen=True)
class Ran:
    """The blocks, what each printed, and the names they left."""

    blocks: list[re.Match[str]]
    printed: list[str]
    names: dict[str, Any]


@pytest.fixture(scope="module")
def ran(smollm2: Any) -> Ran:
    blocks, printed, names = list(BLOCK.finditer(README)), [], dict[str, Any]()
    for number, block in enumerate(blocks):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block["code"], f"README.md, python block {number + 1}", "exec"), names)
        printed.append(out.getvalue())
    return Ran(blocks, printed, names)


def test_python_blocks_print_what_is_shown(ran: Ran) -> None:
    assert len(ran.blocks) == README.count("```python") >= 5
    for block, printed in zip(ran.blocks, ran.printed, strict=True):
        code, shown = block["code"], block["shown"] or ""
        assert same(shown, printed), f"{code}prints\n{printed}\nand shows\n{shown}"


def test_the_picture_is_of_what_the_first_block_prints() -> None:
    block = next(BLOCK.finditer(README))
    lines = [line.split(" -> ") for line in block["shown"].splitlines()]
    assert tuple(map(tuple, lines)) == first_picture.ANSWERS
    assert first_picture.QUESTION in block["code"] and "docs/figures/programs.svg" in README
    drawn = first_picture.picture(first_picture.ANSWERS)
    assert first_picture.FILE.read_text(encoding="utf-8") == drawn, (
        "PYTHONPATH=tests/support python tests/support/first_picture.py"
    )


def test_the_first_numbers_are_measured() -> None:
    first = README.partition("## How it works")[0]
    results = (ROOT / "docs" / "results" / "dispatch-cpu.md").read_text(encoding="utf-8")
    gains = re.findall(r"(\+[\d.]+)(?: points)? (\[[^\]]*\])", first)
    assert len(gains) == 2
    for gain, interval in gains:
        assert f"| {gain} {interval} |" in results
    for share in ("13.7 %", "16.7 %", "85.5 %"):
        assert share in first and share in results


def test_blocks_of_the_guides_print_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that show something run; the others, which need a model or a GPU, are Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "polar_fx").symlink_to(ROOT / "polar_fx")
    shown = 0
    for document in sorted((ROOT / "docs").rglob("*.md")):
        for block in BLOCK.finditer(document.read_text(encoding="utf-8")):
            code = compile(block["code"], document.name, "exec")
            if block["shown"]:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, {})
                assert same(block["shown"], out.getvalue()), (
                    f"{document.name} prints {out.getvalue()}"
                )
                shown += 1
    assert shown


NOTEBOOK = ROOT / "docs" / "examples" / "programs.ipynb"


def cells() -> Iterator[tuple[str, str]]:
    """Each code cell of the notebook, and what it shows as printed."""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            streams = [out["text"] for out in cell["outputs"] if out["output_type"] == "stream"]
            yield "".join(cell["source"]), "".join("".join(text) for text in streams)


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; returns the value of a last line that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
    return None


def test_the_notebook_prints_what_it_shows(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model that the README's blocks captured."""
    model, tokenizer = ran.names["model"], ran.names["tokenizer"]
    monkeypatch.setattr("polar_fx.load", lambda: (model, tokenizer))
    names, shown_last = dict[str, Any](), 0
    for code, shown in cells():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            value = run_cell(code, names)
        assert same(shown, out.getvalue()), f"{code} prints\n{out.getvalue()}"
        shown_last += hasattr(value, "_repr_html_") and "<" in value._repr_html_()
    assert shown_last == 2, "a program and a report are shown as pictures"


def commands() -> Iterator[tuple[str, str]]:
    """Each command of the README that shows what it prints, and that."""
    for block in COMMANDS.findall(README):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def test_commands_print_what_is_shown(
    ran: Ran, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the model that the blocks captured, which takes a while."""
    names = ran.names
    monkeypatch.setattr(run, "load_model", lambda *a: (names["model"], names["tokenizer"]))
    monkeypatch.setattr(run, "compiled_or_interpreted", lambda *a, **k: names["compiled"])
    found = list(commands())
    assert found
    for command, shown in found:
        python, module, name, *arguments = shlex.split(command)
        assert (python, module, name) == ("python", "-m", "polar_fx")
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert same(shown, printed), f"{command} prints\n{printed}\nand shows\n{shown}"
