"""The command line, on a tiny model in a folder; the demo on the embedded model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from places import ROOT
from polar_fx.cli import main
from polar_fx.cli.options import row_length
from polar_fx.cli.shown import Shown
from polar_fx.explain.picture import picture
from polar_fx.program import Program
from polar_fx.program.strip import LEGEND
from tiny_models import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama and a tokenizer that knows single characters."""
    path = tmp_path_factory.mktemp("model")
    characters = {chr(c): c - 32 for c in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(characters | {"\n": 95, "?": 31}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    make("llama").save_pretrained(path)
    return str(path)


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_answers_with_every_program(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    programs = ["--program", "identity", "--program", "0 (1-2)*2 3"]
    result = _json(
        capsys, "run", "--model", folder, "--prompt", "2 + 2", "--max-new-tokens", "6", *programs
    )
    assert [r["steps"] for r in result["results"]] == [4, 6]
    assert [r["name"] for r in result["results"]] == ["identity", "0 (1-2)*2 3"]
    assert all(
        len(r["text"]) >= 1 and r["prefill_ms"] > 0 and r["token_ms"] > 0 for r in result["results"]
    )
    assert result["prompt_tokens"] == 5


def test_prompts_of_many_lengths_run_at_one(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As short as is useful, and as the model allows: so regions are shared, also with
    `compile`.
    """

    def length(prompt: int, new: int, *more: str) -> int:
        arguments = (
            "--model",
            folder,
            "--prompt",
            "2" * prompt,
            "--max-new-tokens",
            str(new),
            *more,
        )
        return _json(capsys, "run", *arguments)["max_length"]

    compiled = _json(capsys, "compile", "--model", folder, "--backend", "eager")["report"][
        "max_length"
    ]
    assert length(1, 1) == length(9, 3) == length(255, 2) == compiled == 256
    assert length(3, 2, "--max-length", "4") == 4, "the last token is never fed back"


def test_row_lengths_are_powers_of_two_within_the_models_limit() -> None:
    def length(tokens: int, **config: Any) -> int:
        model = SimpleNamespace(config=PreTrainedConfig(**config), modules=lambda: ())
        return row_length(model, tokens)

    assert [length(n, max_position_embeddings=600) for n in (1, 256, 257, 512, 513, 700)] == [
        256,
        256,
        512,
        512,
        600,
        700,
    ]
    assert length(5, max_position_embeddings=100) == 100 and length(1025) == 2048, "no limit"


def test_run_prints_only_the_text_to_stdout(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--model", folder, "--prompt", "2 + 2", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == _json(capsys, *arguments)["results"][0]["text"].strip()
    assert "4 steps" in shown.err


def test_run_shows_a_text_while_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    """As much as later tokens cannot change, and each part once."""

    class Text:
        def known(self, ids: Sequence[int]) -> str:
            return self.whole(ids[:-1])

        def whole(self, ids: Sequence[int]) -> str:
            return "".join(f"<{number}>" for number in ids)

    shown: Any = Shown(cast(Any, Text()))
    parts = []
    for ids in ([1], [2, 3], []):
        shown.add(ids)
        parts.append(capsys.readouterr().out)
    shown.end()
    assert [*parts, capsys.readouterr().out] == ["", "<1><2>", "", "<3>\n"]


def test_sampling_repeats_with_its_seed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "run",
        "--model",
        folder,
        "--prompt",
        "2 + 2",
        "--sample",
        "--temperature",
        "3",
        "--max-new-tokens",
        "16",
    ]
    texts = [
        _json(capsys, *arguments, "--seed", seed)["results"][0]["text"] for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_inspect_shows_kinds_parameters_and_the_picture(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", folder, "--program", "skip 1"]) == 0
    out = capsys.readouterr().out
    assert (
        "layer_kind_0" in out
        and "0-3" in out
        and "■·■■   3 steps" in out
        and LEGEND in out
        and "dedupe-layers: layer graphs 4 -> 1" in out
    )
    summary = _json(capsys, "inspect", "--model", folder)
    assert summary["depth"] == 4
    # attention 32*32*2 + 32*16*2, feed-forward 32*64*3, two norms of 32
    assert [g["parameters_each"] for g in summary["graphs"] if g["graph"] == "layer_kind_0"] == [
        2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 64
    ]


def test_inspect_prints_graphs(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls = {}
    for which in ("before", "library", "after", "flat", "diff"):
        assert main(["inspect", "--model", folder, "--program", "0 (1)*2 3", "--graph", which]) == 0
        calls[which] = capsys.readouterr().out
    assert "@layer_kind_0" not in calls["before"] and "@layer_kind_0" not in calls["flat"]
    assert (
        calls["library"].count("= @layer_kind_0(") == 4
        and calls["after"].count("= @layer_kind_0(") == 4
    )
    assert "kv_3_0" in calls["after"] and calls["diff"].startswith("--- before")
    assert (
        calls["flat"].count("scaled_dot_product_attention")
        == 4
        == calls["before"].count("scaled_dot_product_attention")
    )


PICTURES = {
    "identity": (12, "■■■■■■■■■■ ■■   12 steps, 100% of the 12 layers\n0-11 /12\nkeep 0-11"),
    "skip 3-5": (
        8,
        "■■■···■■   5 steps, 62% of the 8 layers\n0-2 6-7 /8\nkeep 0-2 | skip 3-5 | keep 6-7",
    ),
    "repeat 1-2 x3 @0.5": (
        4,
        "■³³■   8 steps, 200% of the 4 layers\n0 (1-2)*3@0.5 3 /4\nkeep 0 | repeat 1-2 x3 @0.5 | "
        "keep 3",
    ),
    "3 2": (
        4,
        "··■■   2 steps, 50% of the 4 layers\n3 2 /4\nno sequence of skip, keep and repeat "
        "segments runs this path",
    ),
    "(0)*12": (1, "+   12 steps, 1200% of the 1 layers\n(0)*12 /1\nrepeat 0 x12"),
}


@pytest.mark.parametrize("text", PICTURES)
def test_pictures(text: str) -> None:
    depth, want = PICTURES[text]
    assert picture(Program.parse(text, depth)) == want


BAD = {
    "program": (["--program", "0-1 ?? 2"], "^"),
    "depth": (["--program", "0-6 /7"], "7"),
    "backend": (["--backend", "tensorflow"], "known: auto, aot_inductor, eager, inductor"),
    "prompt": (["--prompt", "  "], "the prompt is empty"),
    "temperature": (["--sample", "--temperature", "0"], "--temperature"),
    "length": (
        ["--prompt", "2222", "--max-length", "8", "--max-new-tokens", "6"],
        "name at least 9",
    ),
    "model": (["--model", "/nowhere/at all"], "/nowhere/at all"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_status_2(
    case: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    assert main(["run", "--prompt", "2", "--model", folder, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and "Traceback" not in shown.err


def test_bad_numbers_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--prompt", "2", "--max-new-tokens", "0"])
    assert stop.value.code == 2 and "at least 1, got '0'" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, polar_fx.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: assert "
        "'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "run" in result.stdout and "inspect" in result.stdout and "demo" in result.stdout


@pytest.mark.slow
def test_demo_runs_on_the_embedded_model(smollm2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(capsys, "demo", "--backend", "eager", "--questions", "2", "--program", "skip 5")
    hf, identity, skipped = result["runs"]
    assert identity["answers"] == hf["answers"] and len(skipped["answers"]) == 2
    assert (identity["steps"], skipped["steps"]) == (30, 29)


def test_demo_dispatches_test_questions(smollm2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(capsys, "demo", "--backend", "eager", "--questions", "2", "--seed", "1")
    assert [each["task"] for each in result["questions"]] == ["addition", "multiplication"]
    for each in result["questions"]:
        own, identity, dispatched = each["answers"].values()
        assert identity["text"] == own["text"]
        assert dispatched["steps"] == Program.parse(dispatched["program"]).num_steps
        assert 0 < dispatched["probability"] < 1
    for name, way in result["ways"].items():
        assert way["right"] == sum(q["answers"][name]["right"] for q in result["questions"])
    assert main(["demo", "--dtype", "float32"]) == 2
    assert "the shipped predictor is for bfloat16" in capsys.readouterr().err
