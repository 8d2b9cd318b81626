"""A task of lm-eval from questions made here: its data is a local JSON file, and nothing is
downloaded.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import InputError
from ..output.files import replace_file
from ..questions import PromptTemplate, Split, generate, get_template

Kind = Literal["generate_until", "loglikelihood"]


def local_task(
    task: str,
    folder: str | Path,
    count: int = 100,
    *,
    kind: Kind = "generate_until",
    seed: int = 0,
    split: Split | None = "test",
    template: PromptTemplate | None = None,
) -> dict[str, Any]:
    """Write a task of made questions to `folder` (NAME.jsonl, NAME.yaml), and return what
    `simple_evaluate` takes for it.

    NAME, its `task`, is `polar_fx_TASK_KIND`; lm-eval's command line finds it with `--include_path
    folder --tasks NAME`. "generate_until" compares the generated answer (`exact_match`);
    "loglikelihood" asks in one pass whether greedy decoding gives answer and stop (`acc`).
    `template` is the prompt (default: the task's few-shot one). Raises InputError for an unknown
    task, split or kind, a chat prompt, and a folder that cannot be written.
    """
    template = template or get_template("few-shot", task)
    if kind not in get_args(Kind):
        raise InputError(f"unknown kind of task {kind!r}; use one of {', '.join(get_args(Kind))}")
    if template.chat:
        raise InputError(
            f"prompt template {template.key} is a chat's; use another, and lm-eval's "
            "apply_chat_template"
        )
    rows = [
        {
            "id": question.id,
            "prompt": template.prompt.replace("{question}", question.question.strip()),
            "answer": question.answers[0],
            "target": template.answer.replace("{answer}", question.answers[0]) + template.stop,
        }
        for question in generate(task, count, seed, split=split)
    ]
    name = f"polar_fx_{task.replace('-', '_')}_{kind}"
    folder = Path(folder).absolute()
    config = _config(name, folder, kind=kind, template=template)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        replace_file(folder / f"{name}.jsonl", lines)
        # JSON is YAML too
        replace_file(folder / f"{name}.yaml", [json.dumps(config, indent=1).encode() + b"\n"])
    except OSError as error:
        raise InputError(
            f"the task cannot be written to {folder}: {error.strerror or error}; name another "
            "folder"
        ) from error
    return config


def _config(name: str, folder: Path, *, kind: Kind, template: PromptTemplate) -> dict[str, Any]:
    """What lm-eval's YAML says of the task."""
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": kind,
        "num_fewshot": 0,
        "dataset_kwargs": {
            "data_files": {"test": str(folder / f"{name}.jsonl")},
            "cache_dir": str(folder / "datasets"),
        },
        "doc_to_text": "prompt",
    }
    if kind == "loglikelihood":
        metrics = ("acc", "perplexity")
        config |= {"doc_to_target": "target", "target_delimiter": ""}
    else:
        metrics = ("exact_match",)
        stops = {"until": [template.stop]} if template.stop else {}
        config |= {
            "doc_to_target": "answer",
            "generation_kwargs": {
                **stops,
                "max_gen_toks": template.max_new_tokens,
                "do_sample": False,
            },
            "filter_list": [
                {
                    "name": "none",
                    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                }
            ],
        }
    return config | {
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": template.version},
    }
