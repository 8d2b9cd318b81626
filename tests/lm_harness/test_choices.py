"""Questions with choices, judged here and by lm-evaluation-harness through HuggingFace."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness_samples import DEPTH, evaluate_tasks
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.program import Program
from polar_fx.questions import Question, any_template, best_choice

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'polar_fx[harness]'")

# lm-eval's and datasets' own are not ours to fail on
pytestmark = pytest.mark.filterwarnings("default")

ROWS = {
    "arc_easy": [
        ("Which is hot?", ["ice", "the sun", "a wet stone"], 1),
        ("What falls?", ["rain", "smoke from a fire"], 0),
        ("It is 2 + 2.", ["4", "22", "five", "fo"], 0),
    ],
    "openbookqa": [
        ("A cat is", ["a plant", "an animal that eats"], 1),
        ("Ice is", ["x", "cold"], 1),
    ],
    "social_iqa": [("Al fell. How does Al feel?", ["hurt", "as tall as a tree", "wet"], 0)],
    "winogrande": [
        ("Ann met Bo, because _ was late.", ["Ann", "Bo"], 0),
        ("The cup did not fit the box, as the _ was small .", ["cup", "box"], 1),
    ],
}
# As lm_eval/tasks has them; with `choices` and `gold` for the fields of each data set.
CONFIGS: dict[str, dict[str, Any]] = {
    "arc_easy": {"doc_to_text": "Question: {{question}}\nAnswer:"},
    "openbookqa": {"doc_to_text": "{{question}}"},
    "social_iqa": {"doc_to_text": "Q: {{question}}\nA:"},
    "winogrande": {
        "doc_to_text": lambda row: row["gold"],
        "doc_to_target": lambda row: row["question"].partition("_")[2].strip(),
        "doc_to_choice": lambda row: [
            row["question"].partition("_")[0] + c for c in row["choices"]
        ],
    },
}


def _task(name: str, folder: Path) -> dict[str, Any]:
    file = folder / f"{name}.jsonl"
    rows = [{"question": q, "choices": c, "gold": g} for q, c, g in ROWS[name]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(file)},
            "cache_dir": str(folder / "datasets"),
        },
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **CONFIGS[name],
    }


def test_the_identity_has_lm_evals_numbers(
    tokenizer: Any, compiled: Any, reference: Any, offline: None, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    tasks = [_task(name, tmp_path) for name in ROWS]
    found = evaluate_tasks(HFLM(reference, tokenizer=tokenizer, backend="causal"), *tasks)
    forcing, identity = TeacherForcing(compiled), Program.identity(DEPTH)
    for name, rows in ROWS.items():
        questions = [
            Question(f"{name} {i}", name, text, (choices[gold],), choices=tuple(choices))
            for i, (text, choices, gold) in enumerate(rows)
        ]
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        for prompt, metric in (("choices", "acc"), ("choices-norm", "acc_norm")):
            encoded = any_template(prompt, name).encode_all(tokenizer, questions)
            pairs = [(each, identity) for each in encoded]
            scores, verdicts = forcing.choice_scores(pairs), forcing.evaluate(pairs)
            if prompt == "choices":
                for sample, own in zip(samples, scores, strict=True):
                    theirs = [float(each[0][0]) for each in sample["resps"]]
                    assert own == pytest.approx(theirs, abs=1e-3)
            if name != "winogrande" or metric == "acc":  # it has no acc_norm
                for verdict, sample in zip(verdicts, samples, strict=True):
                    assert verdict.correct == bool(sample[metric])
            for each, own, verdict in zip(encoded, scores, verdicts, strict=True):
                assert each.choice is not None
                assert verdict.correct == (best_choice(own) == each.choice.right)
