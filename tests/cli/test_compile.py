"""`polar_fx compile`: what it compiles, prints and draws, on a tiny model in a folder."""

import json
import shlex
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polar_fx.cli import main, opened
from polar_fx.store import ArtifactStore
from portable_regions import use_graphs
from tiny_models import make

PROGRAMS = ("--program", "skip 1", "--program", "0 (2-3)*2@0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer that knows one word."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    make("llama").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for this file; models and artifacts of the user stay alone."""
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(artifacts))


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["compile", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_prints_the_report_and_every_program(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["compile", "--model", folder, "--backend", "eager", "--max-length", "31", *PROGRAMS])
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out.startswith(
        "LlamaForCausalLM: 4 layers, float32 on cpu, backend eager, up to 31 tokens a row\n"
    )
    assert "linked    2 programs" in shown.out and "slots of 32 tokens" in shown.out
    for text in ("■·■■   3 steps", "■·²²   5 steps", "keep 0 | skip 1 | repeat 2-3 x2 @0.5"):
        assert text in shown.out
    assert "backend eager keeps no compiled code" in " ".join(shown.err.split())


def test_json_has_everything(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(
        capsys,
        "--model",
        folder,
        "--backend",
        "eager",
        "--batch",
        "3",
        *PROGRAMS,
        "--program",
        "0 2-3",
    )
    assert result["report"]["backend"] == "eager" and result["graphs"] == []
    assert [(p["program"], p["num_steps"], p["cost"]["batch"]) for p in result["programs"]] == [
        ("0 2-3 /4", 3, 3),
        ("0 (2-3)*2@0.5 /4", 5, 3),
    ], "equal programs once"
    assert result["report"]["max_length"] == 256, "the model's own limit"


@pytest.mark.slow
def test_the_second_process_reads_and_loads(
    folder: str,
    artifacts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So does `run`: without --max-length, both compile for the same one."""
    use_graphs(monkeypatch, artifacts)
    arguments = ["--model", folder, "--backend", "auto"]
    assert main(["compile", *arguments, "--program", "skip 1"]) == 0
    shown = capsys.readouterr()
    assert "backend aot_inductor" in shown.out and "6 compiled, the slowest in" in shown.out
    assert "compiled 6 regions" in shown.err and "keeps no compiled code" not in shown.err
    stored = {e.key for e in ArtifactStore().entries()}
    assert main(["compile", *arguments, *PROGRAMS]) == 0
    shown = capsys.readouterr()
    assert (
        "read 4 layers from the symbol table on disk" in shown.err and "compiled" not in shown.err
    )
    assert "0 compiled, 6 loaded in" in shown.out and "nothing was traced" in shown.out
    assert main(["run", *arguments, *PROGRAMS, "--prompt", "? ? ?", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert (
        "read 4 layers" in shown.err
        and "compiled" not in shown.err
        and "skip 1  3 steps" in shown.err
    )
    assert {
        e.key for e in ArtifactStore().entries()
    } == stored and ArtifactStore().root.is_relative_to(artifacts)
    run = ["run", "--model", folder, *PROGRAMS, "--prompt", "? ? ?", "--max-new-tokens", "3"]
    assert main([*run, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["backend"] == "aot_inductor", "regions that are there are used"
    assert [r["name"] for r in result["results"]] == ["skip 1", "0 (2-3)*2@0.5"], "as typed"
    assert main([*run, "--json", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["backend"] == "eager", "there are none of this type"
    compile = f"python -m polar_fx compile --model {folder} --dtype bfloat16"
    assert f"`{compile}` makes regions" in shown.err
    assert main(shlex.split(compile)[3:]) == 0 and "compiled 6 regions" in capsys.readouterr().err
    assert main([*run, "--json", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["backend"] == "aot_inductor", "the command that was shown made it"


@pytest.mark.parametrize("suffix", [".dot", ".svg"])
def test_pictures(
    suffix: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", folder, "--backend", "eager", "--graph", str(tmp_path / f"p{suffix}"))
    assert _json(capsys, *arguments)["graphs"] == [str(tmp_path / f"p{suffix}")]
    assert _json(capsys, *arguments, *PROGRAMS)["graphs"] == [
        str(tmp_path / f"p-{i}{suffix}") for i in (1, 2)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"p-1{suffix}",
        f"p-2{suffix}",
        f"p{suffix}",
    ]
    assert "x2 @0.5" in (tmp_path / f"p-2{suffix}").read_text(encoding="utf-8")


BAD = {
    "suffix": (["--graph", "out.png"], "--graph out.png has no known suffix"),
    "batch": (["--tier", "whole", "--batch", "2"], "--tier whole serves one row"),
    "tier": (
        ["--tier", "whole", "--backend", "eager"],
        "--tier whole needs the CPU, the artifact store",
    ),
    "program": (["--program", "0-1 ?? 2", "--backend", "eager"], "^"),
    "backend": (["--backend", "tensorflow"], "known: auto, aot_inductor, eager, inductor"),
    "length": (["--max-length", "257"], "exceeds the 256 positions"),
    "model": (["--model", "/nowhere/at all"], "/nowhere/at all"),
    "folder": (["--graph", "/nowhere/p.dot"], "make /nowhere first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_status_2(
    case: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    assert main(["compile", "--model", folder, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and "Traceback" not in shown.err


def test_inspect_takes_auto(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", folder, "--backend", "auto", "--program", "skip 1"]) == 0
    assert "■·■■   3 steps" in capsys.readouterr().out


def test_the_command_that_makes_regions_names_another_length() -> None:
    def compiled(length: int) -> Any:
        return SimpleNamespace(
            device=SimpleNamespace(type="cpu"), pool=SimpleNamespace(max_length=length)
        )

    options = Namespace(model="a model", dtype="float32", quantize="int8")
    told = opened._faster(options, compiled(128), usual=128)
    assert told.startswith("`python -m polar_fx compile --model 'a model' --quantize int8` makes")
    told = opened._faster(options, compiled(512), usual=128)
    assert told.startswith(
        "`python -m polar_fx compile --model 'a model' --quantize int8 --max-length 512` makes"
    )
