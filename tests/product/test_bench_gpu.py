"""The GPU benchmark: a trial run on the CPU, its refusals, what it computes, and what is left of a
worker that was killed.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
import gpu_results
import polar_fx
from gpu_micro import attention_ways
from gpu_models import decode_bytes
from gpu_shapes import SHAPES, that_fit
from gpu_team import Team
from polar_fx import Program
from tiny_models import make

BENCH = Path(gpu.__file__)
STAGES = ("correct", "search", "speed", "graphs", "table4", "mixed", "generate", "profile", "micro")
WAYS = {"linked+graph", "linked untuned+graph", "linked", "HF eager", "HF compile", "whole+graph"}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of a run with one tiny model."""
    out = tmp_path_factory.mktemp("trial") / "out"
    options = [
        "--tiny",
        "--device",
        "cpu",
        "--budget",
        "400",
        "--go",
        "0.8",
        "--stages",
        ",".join(STAGES),
        "--out",
        str(out),
    ]
    command = [sys.executable, str(BENCH), *options, "--models", "smollm2-135m"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)
    assert run.returncode == 0, run.stderr
    return out


def lines_of(out: Path, stage: str) -> list[dict[str, Any]]:
    return [line for line in gpu_results.read(out / "results.jsonl") if line["stage"] == stage]


@pytest.mark.slow
def test_every_stage_writes_its_lines_and_none_fails(trial: Path) -> None:
    lines = gpu_results.read(trial / "results.jsonl")
    assert not [
        line
        for line in lines
        if "error" in line or line["stage"] in ("stopped", "ended", "left-out")
    ]
    stages = {line["stage"] for line in lines}
    # which writes the last two
    assert {*STAGES, "env", "bandwidth", "go", "attention", "linear"} - stages == {"micro"}
    assert all(
        line["ok"] and line["loop"] < 1e-4 and line["same_tokens"]
        for line in lines_of(trial, "correct")
    )
    assert all(line["ok"] for line in lines_of(trial, "search"))
    assert lines_of(trial, "bandwidth")[0]["sum_gbs"] > 0
    assert lines_of(trial, "go")[0]["ready"] == ["smollm2-135m", "micro"]


@pytest.mark.slow
def test_ways_agree_and_are_timed(trial: Path) -> None:
    assert all(line["to_the_first_way"] < 1e-4 for line in lines_of(trial, "first"))
    speed = lines_of(trial, "speed")
    assert {line["way"] for line in speed} == WAYS
    assert {(line["batch"], line["length"]) for line in speed} == {(1, 47), (1, 95), (8, 47)}
    for line in speed:
        assert (
            line["decode_ms"] > 0
            and line["prefill"]["min"] <= line["prefill"]["ms"] <= line["prefill"]["max"]
        )
        read = line["weight_mb"] + line["kv_mb"]
        assert (
            line["gbs"] == pytest.approx(read / line["decode_ms"], rel=0.1, abs=0.02) and read > 0
        )


@pytest.mark.slow
def test_parts_give_what_they_promise(trial: Path) -> None:
    (graphs,), (table4,), (mixed,), (generate,) = (
        lines_of(trial, s) for s in ("graphs", "table4", "mixed", "generate")
    )
    assert graphs["programs"] == 3 and graphs["link_ms"] > 0 and not graphs["failed"]
    assert math.isclose(
        table4["ratio"],
        0.3 + 0.7 * table4["one_skipped_ms"] / table4["identity"]["ms"],
        abs_tol=1e-3,
    )
    assert 0 < table4["routing_share"] < 10
    assert [*mixed["ms_by_programs"]] == ["1", "2", "4"] and mixed["times_uniform"]["1"] == 1
    assert generate["ours_ms"] > 0 and generate["hf_ms"] > 0
    assert all(line["kernels"] > 0 for line in lines_of(trial, "profile"))
    for line in lines_of(trial, "attention"):
        assert all(
            isinstance(found, list) and found[1] < 0.05
            for found in line["us_and_difference"].values()
        )


@pytest.mark.slow
def test_summary_names_every_way(trial: Path) -> None:
    text = (trial / "summary.txt").read_text()
    assert all(f"  {way} " in text for way in WAYS)
    assert "===== smollm2-135m" in (trial / "log.txt").read_text()


# ----------------------------------------------------------------------------- workers that go away


def test_killed_workers_leave_results_readable(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    results = out / "results.jsonl"
    half = f"import os, signal; open({str(results)!r}, 'a').write('{{\"stage\": \"sp'); "
    team = Team(out, scratch, started=time.time())
    team.say("before")
    team.start(
        "dies",
        [sys.executable, "-c", half + "os.kill(os.getpid(), signal.SIGKILL)"],
        limit=time.time() + 60,
    )
    team.wait_until(lambda: not team.is_running("dies"), time.time() + 60)
    team.stop("dies")
    team.start(
        "hangs",
        [sys.executable, "-c", half + "import time; time.sleep(600)"],
        limit=time.time() - 1.5,
    )
    # ended by its own limit
    team.wait_until(lambda: "hangs" not in team._running, time.time() + 60)
    team.start(
        "fails", [sys.executable, "-c", "raise SystemExit('no such thing')"], limit=time.time() + 60
    )
    team.wait_until(lambda: not team.is_running("fails"), time.time() + 60)
    team.stop_all()
    lines = gpu_results.read(results)
    assert [line["stage"] for line in lines] == ["before", "ended", "stopped", "ended"]
    assert lines[2]["worker"] == "hangs" and "no such thing" in lines[3]["last"]
    assert "no such thing" in gpu_results.summary(lines) and "no such thing" in team.logs()


def test_a_run_that_is_too_short_says_who_was_stopped(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(BENCH),
        "--tiny",
        "--device",
        "cpu",
        "--budget",
        "2",
        "--stages",
        "correct,speed",
    ]
    subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, timeout=120, check=True
    )
    assert {line["worker"] for line in lines_of(tmp_path / "out", "stopped")} >= {
        "smollm2-135m",
        "qwen1.5-moe-a2.7b",
    }
    assert (tmp_path / "out" / "summary.txt").read_text()


# --------------------------------------------------------------------------------- what it computes


def test_decode_bytes_counts_weights_once_a_step_and_whole_slots() -> None:
    compiled = polar_fx.compile(make("llama"), "eager", max_length=31, cache=False)
    library, identity = compiled.library, Program.identity(4)
    weights, kv = decode_bytes(library, identity, columns=32)
    layer = sum(w.nbytes for w in library.layers[0].weights)
    head = sum(w.nbytes for w in library.epilogue.weights)
    assert weights == 4 * layer + head
    assert kv == 4 * 32 * 2 * 2 * 8 * 4  # steps, columns, keys and values, heads, size, bytes
    assert decode_bytes(library, identity.skip(1, 1), columns=32, batch=3) == (
        3 * layer + head,
        3 * kv * 3 // 4,
    )


def test_decode_bytes_counts_the_experts_a_token_is_sent_to() -> None:
    compiled = polar_fx.compile(make("qwen2_moe"), "eager", max_length=31, cache=False)
    all_of_them, half = (
        decode_bytes(compiled.library, compiled.default_program, columns=32, experts=e)[0]
        for e in (1.0, 0.5)
    )
    experts = sum(
        w.nbytes for layer in compiled.library.layers for w in layer.weights if w.dim() == 3
    )
    assert all_of_them - half == experts // 2 > 0


def test_ways_of_attention_agree() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 16) for heads, tokens in ((6, 1), (2, 24), (2, 24)))
    mask = (torch.arange(24) < 20)[None, None, None].expand(2, 1, 1, 24)
    want, *others = (way() for way in attention_ways(q, k, v=v, mask=mask).values())
    for got in others:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def _speed(way: str, ms: float, **others: Any) -> dict[str, Any]:
    timing = {
        "prefill": {"ms": 9.0},
        "decode_ms": ms,
        "device_ms": None,
        "host_ms": None,
        "gbs": 100.0 / ms,
    }
    return {
        "stage": "speed",
        "model": "m",
        "way": way,
        "batch": 1,
        "length": 271,
        **timing,
        **others,
    }


def test_rows_are_sorted_and_compared_within_their_setting() -> None:
    lines = [
        {"stage": "bandwidth", "sum_gbs": 200.0},
        _speed("HF compile", 2.0),
        _speed("linked+graph", 1.0, device_ms=0.9, host_ms=0.1),
        _speed("linked+graph", 5.0, length=4111),
        {"stage": "speed", "model": "m", "way": "whole+graph", "error": "RuntimeError: no"},
    ]
    rows = gpu_results.speed_rows(lines)
    assert [(row[1], row[3]) for row in rows] == [
        ("linked+graph", "271"),
        ("HF compile", "271"),
        ("linked+graph", "4111"),
    ]
    assert rows[0][4:] == ("9.00", "1.000", "0.900", "0.100", "100", "50%", "0.50")
    assert rows[2][-1] == "-" and rows[1][6] == "-"
    assert "RuntimeError: no" in gpu_results.summary(lines).splitlines()[-1]


def test_wrong_results_stand_out() -> None:
    found = dict.fromkeys(("loop", "hf_itself", "kv_law", "replay_minus_linked"), 1.0)
    line = {
        "stage": "correct",
        "family": "f",
        "dtype": "float32",
        "backend": "eager",
        "ok": False,
        "captured": 0,
        **found,
    }
    assert "WRONG" in gpu_results.summary([line])


def test_plan_puts_the_valuable_first_and_nothing_unasked() -> None:
    jobs = gpu.plan(gpu.STAGES, list(SHAPES), tiny=False)
    assert [job.name for job in jobs][:6] == [
        "correct-1",
        "correct-2",
        "correct-3",
        "search",
        "files",
        "tests",
    ]
    assert [job.name for job in jobs if job.timed] == [*SHAPES, "micro"]
    assert [job.name for job in gpu.plan(["table4"], list(SHAPES), tiny=False)] == [
        "qwen1.5-moe-a2.7b"
    ]
    assert [job.work for job in gpu.plan(["search", "aoti"], [], tiny=True)] == [("search", "aoti")]
    assert all(0 < job.limit < 300 for job in jobs)


def test_models_that_do_not_fit_together_are_left_out() -> None:
    assert that_fit(SHAPES, 139) == list(SHAPES)
    assert "qwen2.5-7b" in that_fit(SHAPES, 79) and "qwen2.5-3b" not in that_fit(SHAPES, 79)
    assert that_fit(SHAPES, 2) == []


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--models gpt-7", "unknown model 'gpt-7'; known: qwen2.5-0.5b, llama-3.2-3b"),
        ("--stages speed,sped", "unknown stage 'sped'; known: correct, search"),
        ("--stages ,", "no stage is named"),
        ("--go 1.5", "'1.5' is no number between 0 and 1"),
        ("--budget soon", "'soon' is no number between 1 and"),
        ("--device cpu", "--device cpu needs --tiny"),
    ],
)
def test_arguments_are_refused_with_what_would_do(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.parse_arguments(arguments.split())
    assert refused.value.code == 2 and says in capsys.readouterr().err


def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse_arguments([])
    assert "install a CUDA build of torch" in capsys.readouterr().err


def test_results_of_another_run_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"stage": "env"}) + "\n")
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert "holds the results of another run" in capsys.readouterr().err
    first = gpu.results_folder(tmp_path, "2026-01-02", card="h200")
    first.mkdir()
    assert (first.name, gpu.results_folder(tmp_path, "2026-01-02", card="h200").name) == (
        "2026-01-02-h200",
        "2026-01-02-h200-2",
    )


def test_names_come_in_the_order_of_their_worth() -> None:
    options = gpu.parse_arguments(
        [
            "--tiny",
            "--device",
            "cpu",
            "--models",
            "qwen2.5-3b, qwen2.5-0.5b",
            "--stages",
            "micro,speed",
        ]
    )
    assert options.models == ["qwen2.5-0.5b", "qwen2.5-3b"] and options.stages == ["speed", "micro"]
    assert gpu.parse_arguments(["--tiny", "--device", "cpu"]).stages == list(gpu.TINY_STAGES)
