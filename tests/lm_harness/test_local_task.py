"""Tasks of questions made here, run by lm-eval from Python and from its command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from harness_samples import DEPTH, evaluate_tasks
from polar_fx.program import Program

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'polar_fx[harness]'")

from polar_fx.lm_harness import PolarLM, local_task

# lm-eval's and datasets' own are not ours to fail on
pytestmark = pytest.mark.filterwarnings("default")


def test_a_task_of_local_questions(
    folder: Path, tokenizer: Any, offline: None, tmp_path: Path
) -> None:
    arguments = {
        "pretrained": str(folder),
        "backend": "eager",
        "max_length": 128,
        "policy": "skip 3",
        "batch_size": 4,
    }
    tasks = [
        local_task("addition", tmp_path, 10, kind=kind)
        for kind in ("generate_until", "loglikelihood")
    ]
    found = evaluate_tasks("polar_fx", *tasks, model_args=arguments)
    names = [task["task"] for task in tasks]
    assert (
        "exact_match,none" in found["results"][names[0]]
        and "acc,none" in found["results"][names[1]]
    )
    report = found["config"]["polar_fx"]
    assert (
        report["policy"] == str(Program.parse("skip 3", DEPTH))
        and json.loads(json.dumps(report)) == report
    )
    for name in names:
        assert (
            report["tasks"][name]["mean_steps"] == DEPTH - 1
            and report["tasks"][name]["questions"] == 10
        )
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        asked = json.dumps(found["samples"][name][0]["arguments"])
        assert all(
            json.dumps(rows[0][part]) in asked
            for part in ("prompt", "target")[: 1 + (name == names[1])]
        )


def test_the_command_line_finds_a_task(
    folder: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    name = local_task("addition", tmp_path / "tasks", 3, kind="loglikelihood")["task"]
    arguments = f"pretrained={folder},backend=eager,max_length=128,program=skip 3"
    monkeypatch.setattr(
        "sys.argv",
        [
            "lm-eval",
            "--model",
            "polar_fx",
            "--model_args",
            arguments,
            "--include_path",
            str(tmp_path / "tasks"),
            "--tasks",
            name,
            "--output_path",
            str(tmp_path / "out.json"),
        ],
    )
    cli_evaluate()
    (written,) = tmp_path.rglob("out*.json")
    found = json.loads(written.read_text())
    assert (
        found["config"]["polar_fx"]["tasks"][name]["mean_steps"] == DEPTH - 1
        and "acc,none" in found["results"][name]
    )


def test_the_task_scores_right_answers_right(
    tokenizer: Any, compiled: Any, offline: None, tmp_path: Path
) -> None:
    task = local_task("addition", tmp_path, 6)
    rows = {
        r["prompt"]: r["answer"]
        for r in map(json.loads, (tmp_path / f"{task['task']}.jsonl").read_text().splitlines())
    }
    wrong = next(iter(rows))

    class Knowing(PolarLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [f" {rows[r.args[0]]}" if r.args[0] != wrong else " 0" for r in requests]

    found = evaluate_tasks(Knowing(compiled, tokenizer), task)
    assert found["results"][task["task"]]["exact_match,none"] == pytest.approx(5 / 6)


def test_chat_templates_are_the_tokenizers(
    folder: Path, compiled: Any, offline: None, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last "
        "%}|{% endif %}{% endfor %}{% if add_generation_prompt %}|[assistant]{% endif %}"
    )
    tokenizer.bos_token = "</s>"
    lm = PolarLM(compiled, tokenizer)
    turns = [{"role": "user", "content": "hi"}]
    assert (
        "/" not in lm.tokenizer_name and lm.apply_chat_template(turns) == "</s>[user]hi|[assistant]"
    )
    assert lm.apply_chat_template(
        [*turns, {"role": "assistant", "content": "A"}], add_generation_prompt=False
    ).endswith("]A")
    assert lm.tok_encode("</s>[user]hi") == tokenizer.encode(
        "</s>[user]hi", add_special_tokens=False
    )
    found = evaluate_tasks(lm, local_task("addition", tmp_path, 2), apply_chat_template=True)
    assert "[user]" in json.dumps(
        found["samples"]["polar_fx_addition_generate_until"][0]["arguments"]
    )
