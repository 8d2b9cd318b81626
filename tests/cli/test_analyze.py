"""`polar_fx analyze`: what it prints and draws, and what it refuses."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from places import ROOT
from polar_fx.cli import main
from polar_fx.cli.analyze import FORMATS
from polar_fx.search.analysis.summary import SearchFile, analyze
from search_samples import HEADER, SAMPLES, SKIP, simple, write


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "100")
    return write(tmp_path / "run [1].jsonl", SAMPLES)


def _json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["analyze", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _line(text: str, start: str, *, nth: int = 0) -> str:
    """The nth line that starts so, with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start)][
        nth
    ]


def test_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(run)]) == 0
    out = capsys.readouterr().out
    assert (
        str(run) in out
        and "6 questions, 6 layers; mcts, 2 programs a question, reward exact" in out
    )
    assert "an oracle over explored programs, chosen by the answer key" in " ".join(out.split())
    assert _line(out, "all ") == "all 6 16.7 [3, 56] 33.3 [10, 70] 50.0 [19, 81] 66.7 [30, 90]"
    assert _line(out, "add, a ").startswith("add, a 2 0.0 [0, 66] 50.0")
    assert _line(out, "mul ").startswith("mul 3 33.3")
    assert _line(out, "all ", nth=1) == "all 1 100.0 [21, 100] 5 60.0 [23, 88] 20.0 [4, 62]"
    assert _line(out, "all ", nth=2) == "all 1.3 0.7 4 6.00"
    assert "9 evaluations in 4.0 s: 2.2 a second" in out
    assert _line(out, "steps, valid").endswith(" 4 4:1 5:1 7:1 8:1")
    assert _line(out, "runs of a repeat").endswith(" 2 2:2")
    assert (
        "50.0 [15, 85] % of 4 verdicts of explored programs flip (of 3 questions; those of one "
        "are alike"
    ) in out
    assert "100.0 [21, 100] % of 1 verdicts of the identity flip" in out
    assert "+0.926 pooled (6 pairs), +1.000 as mean of 2 questions where both vary" in out
    assert "an oracle and a lower bound" in out


def test_json_is_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(capsys, run, "--menu", "2, 1,2")
    assert result.pop("figures") == []
    assert result == json.loads(json.dumps(analyze([SearchFile.read(run)], menu_sizes=[1, 2])))
    assert [row["k"] for row in result["menus"][0]["menus"]["with_identity"]["at"]] == [1, 2]


def test_held_out_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(
        tmp_path / "other.jsonl",
        [SAMPLES[0], simple("q8", {SKIP}), simple("q9", set(), wrong={SKIP})],
    )
    (menu,) = _json(capsys, run, "--held-out", other)["menus"]
    assert (menu["split"], menu["train"], menu["held_out"], menu["left_out"]) == ("files", 6, 2, 1)
    assert main(["analyze", str(run), "--held-out", str(other), "--menu", "1,100"]) == 0
    out = capsys.readouterr().out
    assert (
        "ranked on 6 questions and tried on 2 held out, those of the --held-out files (1 that are "
        "in train as well are"
    ) in out
    # beside the identity SKIP and two others cover one question more each, and SKIP is the
    # shortest; alone SKIP_TWO is, a fourth
    assert _line(out, "1  ") == "1 50.0 [9, 91] 0 33.3 [10, 70] 0.0 [0, 66] 16.7 [3, 56]"
    assert "they end at 3 and 4 programs" in out and "\n 100 " not in out


@pytest.mark.parametrize("json_too", [False, True])
def test_files_without_questions_or_with_one(
    json_too: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write(tmp_path / "empty.jsonl", [], header=replace(HEADER, model="e" * 32))
    one = write(tmp_path / "one.jsonl", SAMPLES[5:])
    if json_too:
        result = _json(capsys, empty, one)
        assert [file["summary"]["questions"] for file in result["files"]] == [0, 1]
        assert [menu["train"] + menu["held_out"] for menu in result["menus"]] == [0, 1]
    else:
        assert main(["analyze", str(empty), str(one)]) == 0
        out = capsys.readouterr().out
        assert "no questions yet" in out and out.count("too few questions to rank a menu") == 2
        assert _line(out, "all ") == "all 1 0.0 [0, 79] 0.0 [0, 79] 0.0 [0, 79] 0.0 [0, 79]"
        assert _line(out, "all ", nth=1) == "all 0 - 1 0.0 [0, 79] 0.0 [0, 79]"
        assert _line(out, "all ", nth=2) == "all 0.0 0.0 0 -"


def test_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = pytest.importorskip("polar_fx.search.analysis.figures")
    assert figures.FORMATS == FORMATS
    folder = tmp_path / "figures"
    drawn = [Path(path) for path in _json(capsys, run, "--figures", folder)["figures"]]
    assert (
        len(drawn) == 6
        and {path.suffix for path in drawn} == {".svg"}
        and sorted(folder.iterdir()) == sorted(drawn)
    )
    assert main(["analyze", str(run), "--figures", str(folder), "--format", "png"]) == 0
    assert f"6 figures in {folder}: run [1]-accuracy.png, " in capsys.readouterr().out


def test_figures_without_matplotlib(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find(name, *rest),
    )
    assert main(["analyze", str(run), "--figures", str(tmp_path / "figures")]) == 2
    assert (
        f"needs matplotlib, which is not installed; pip install -e '{ROOT}[search]'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "figures").exists()
    assert main(["analyze", str(run)]) == 0


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}\n")
    other_model = write(tmp_path / "model.jsonl", [], header=replace(HEADER, model="e" * 32))
    for arguments, message in (
        ([run, "--format", "png"], "--format is of figures, and none are asked for"),
        ([tmp_path / "missing.jsonl"], "missing.jsonl: No such file or directory; "),
        ([tmp_path / "other.json"], "other.json: line 1 is not a header of search records"),
        (
            [run, "--held-out", other_model],
            "model.jsonl is of model eeeeeeeeeeee with 6 layers, which no menu is ranked on",
        ),
        ([run, "--figures", tmp_path / "other.json"], "cannot make the folder"),
    ):
        if "--figures" in arguments and importlib.util.find_spec("matplotlib") is None:
            continue
        assert main(["analyze", *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and message in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("sizes", ["0", "1,,2", "x", "1.5"])
def test_bad_menu_sizes(sizes: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["analyze", str(run), "--menu", sizes])
    assert "whole number of at least 1" in capsys.readouterr().err


def test_it_needs_no_torch_and_no_pyplot(run: Path, tmp_path: Path) -> None:
    figures = ["--figures", str(tmp_path)] if importlib.util.find_spec("matplotlib") else []
    code = (
        "import sys, polar_fx.cli as c\n"
        "assert not {'numpy', 'matplotlib'} & set(sys.modules)\n"
        f"assert c.main({['analyze', str(run), *figures]!r}) == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
