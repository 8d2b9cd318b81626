"""`bench`: what is run, in which order, and what is told; never how long it took."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from places import ROOT
from polar_fx.cli import bench, main, threads
from tiny_bundles import tokenizer_of_words
from tiny_models import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(path)
    tokenizer_of_words().save_pretrained(path)
    return str(path)


def test_every_contender_runs_once_a_round_in_an_order_drawn_anew() -> None:
    calls: list[str] = []

    def contender(name: str) -> Any:
        def generate(ids: Any, streamer: Any, **settings: Any) -> None:
            calls.append(name)
            assert settings == {"max_new_tokens": 3, "min_new_tokens": 3}
            for value in (ids, *torch.zeros(3, 2)):
                streamer.put(value)

        return generate

    names = ("a", "b", "c", "d")
    ids = torch.zeros(2, 5, dtype=torch.long)
    samples = bench.run_rounds({n: contender(n) for n in names}, ids, tokens=3, rounds=6)
    rounds = [tuple(calls[at : at + 4]) for at in range(0, len(calls), 4)]
    assert len(rounds) == 7, "the first one warms up"
    assert all(sorted(each) == list(names) for each in rounds) and len(set(rounds)) > 3
    assert {len(times["prefill"]) for times in samples.values()} == {6}
    assert {len(times["decode"]) for times in samples.values()} == {6}


def test_it_tells_times_beside_huggingface_for_each_number_of_rows(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", folder, "--backend", "eager", "--prompt-tokens", "5"]
    arguments += ["--new-tokens", "3", "--rounds", "2", "--rows", "1", "2"]
    programs = ["--program", "identity", "--program", "skip 1"]
    assert main(["bench", *arguments, *programs, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    told = Counter((line["contender"], line["rows"], line["steps"]) for line in result["results"])
    assert told == Counter(
        (name, rows, steps)
        for rows in (1, 2)
        for name, steps in (("HF eager", 4), ("identity", 4), ("skip 1", 3))
    )
    for line in result["results"]:
        assert len(line["prefill_samples_ms"]) == len(line["decode_samples_ms"]) == 2
        assert min(line["prefill_ms"], line["decode_ms"], line["tokens_per_s"]) > 0
        if line["contender"] == "HF eager":
            assert line["prefill_of_hf"] == line["decode_of_hf"] == 1
    assert (result["rounds"], result["backend"], result["layers"]) == (2, "eager", 4)
    assert result["threads"] == torch.get_num_threads() and result["torch"] == torch.__version__
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("HF eager") for line in lines) == 2
    assert any(line.startswith("identity") and " 4 " in line for line in lines)


def test_what_cannot_be_measured_is_refused(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = ROOT / "tests" / "data" / "former" / "bundle"
    cases = {
        ("--model", str(bundle)): "is a bundle, which HuggingFace cannot run",
        ("--model", folder, "--max-length", "8"): "--max-length 8 is too short for",
    }
    for given, message in cases.items():
        assert main(["bench", *given]) == 2
        assert message in capsys.readouterr().err


def test_several_numbers_of_threads_take_turns(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    arguments = ["--model", folder, "--backend", "eager", "--prompt-tokens", "5", "--rows", "1"]
    arguments += ["--new-tokens", "3", "--rounds", "1", "--threads", "1", "2"]
    assert main(["bench", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["results"]
    assert [(line["contender"], line["threads"]) for line in told] == [
        ("HF eager, 1 thread", 1),
        ("identity, 1 thread", 1),
        ("HF eager, 2 threads", 2),
        ("identity, 2 threads", 2),
    ]
    assert [line["decode_of_hf"] for line in told[::2]] == [1, 1]
    assert torch.get_num_threads() == before
    lines = [
        {"contender": name, "rows": rows, "threads": number, "decode_ms": ms}
        for name, rows, number, ms in (
            ("HF eager, 1 thread", 1, 1, 1.0),
            ("identity, 1 thread", 1, 1, 5.0),
            ("identity, 2 threads", 1, 2, 9.0),
            ("identity, 2 threads", 8, 2, 4.0),
        )
    ]
    text = threads.advice(lines, "HF eager")
    assert text == "fastest here and now: 1 thread; OMP_NUM_THREADS=1 sets that"


def test_a_busy_machine_is_told_where_threads_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "load_of_others", lambda: 0.5)
    threads.warn_if_busy()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(threads, "load_of_others", lambda: 1.5)
    threads.warn_if_busy()
    told = capsys.readouterr().err
    assert "1.5 threads for each core" in told and "bench --threads 1 2" in told
    assert "OMP_NUM_THREADS sets it" in told
    threads.warn_if_busy(4, option="--threads")  # what a server says before it starts
    told = capsys.readouterr().err
    assert "bench --threads 1 4" in told and told.endswith("--threads sets it\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads.warn_if_busy()
    assert capsys.readouterr().err == ""
