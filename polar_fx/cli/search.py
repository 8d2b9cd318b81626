"""Search programs that answer questions: offline labels for a predictor, every explored program
kept.

Goes on where a run of the same settings ended; Ctrl-C loses only the questions being searched.

Examples:
  python -m polar_fx search --task multiplication --questions 200 --out run.jsonl
  python -m polar_fx search --task addition --task sequences --questions 400 --workers 2 \
      --out run.jsonl
  python -m polar_fx search --data questions.jsonl --prompt direct --judge generation \
      --out run.jsonl
  python -m polar_fx analyze run.jsonl
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import add_model_arguments, status, whole
from .questions import (
    add_question_arguments,
    encode,
    file_names,
    measured_difficulty,
    measuring_questions,
    questions_of,
    row_length,
    templates_of,
)

if TYPE_CHECKING:
    from ..search.records.records import SearchRecord
    from ..search.workers import OpenWorkplace, Workplace

_CONVERT: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda v: {"true": True, "false": False}[v.lower()],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    asked = add_question_arguments(parser, "100; all of --data")
    asked.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="of the built-in tasks (default: train)",
    )
    how = parser.add_argument_group("search")
    how.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="search records, JSON lines"
    )
    how.add_argument(
        "--restart", action="store_true", help="begin anew; the old file stays as FILE.old"
    )
    how.add_argument(
        "--method",
        default="mcts",
        help="mcts, scan, random, beam or evolution (default: %(default)s)",
    )
    how.add_argument(
        "--simulations",
        type=whole(1),
        default=200,
        metavar="N",
        help="beside the identity (default: %(default)s)",
    )
    how.add_argument(
        "--reward", default="exact", help="exact, likelihood or margin (default: %(default)s)"
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--nested", action="store_true", help="edit the current path instead of the identity"
    )
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of SearchConfig",
    )
    run = parser.add_argument_group("running")
    run.add_argument(
        "--judge", choices=("teacher-forcing", "generation"), default="teacher-forcing"
    )
    run.add_argument(
        "--verify",
        action="store_true",
        help="generate and grade once more with every program found valid",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="verdicts with the same bits whatever runs beside them",
    )
    run.add_argument(
        "--workers", type=whole(1), default=1, metavar="N", help="processes (default: %(default)s)"
    )
    run.add_argument(
        "--in-flight",
        type=whole(1),
        default=32,
        metavar="N",
        help="questions searched at a time by each worker",
    )
    run.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="workers on a Ray cluster; none: on this machine",
    )
    add_model_arguments(parser, backend="auto")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Search every question that has no record yet; returns and prints counts."""
    config = _config(options)
    questions = questions_of(options)
    import torch  # after what can be refused without it

    from ..search.records.record_file import RecordStore
    from ..search.records.records import SearchHeader
    from ..search.workers import Workplace

    name = options.prompt or ("direct" if options.data else "few-shot")
    templates = templates_of(name, questions)
    from ..models import load, position_limit
    from ..output.digest import digest

    with status().status("loading the model ..."):
        model, tokenizer = load(options.model, options.dtype, options.device)
    options.dtype = str(model.dtype).removeprefix("torch.")
    encoded = encode(tokenizer, questions, templates)
    measuring = measuring_questions(questions)
    others = encode(tokenizer, measuring, templates)
    generated = options.judge == "generation" or options.verify
    length = row_length(
        [*encoded, *others], [*questions, *measuring], templates, position_limit(model), generated
    )
    if options.ray is not None and model.device.type != "cpu":
        raise InputError(
            f"--ray searches on CPUs, and --device is {options.device}; leave one of them out"
        )
    threads = max(1, torch.get_num_threads() // options.workers) if options.workers > 1 else None
    if options.ray is not None:
        threads = 1  # this machine's number says nothing about the cluster's
    workplace = Workplace(
        options.model,
        options.dtype,
        options.backend,
        length,
        options.deterministic,
        options.judge,
        options.verify,
        options.in_flight,
        threads=threads,
        templates=templates,
        device=options.device,
    )
    with status().status("compiling ..."):
        place = workplace.open(questions, (model, tokenizer))
        del model
        for batch in (1, 2):
            place.compiled.warmup(batch=batch)
    asked = {
        "tasks": sorted(templates),
        "questions": len(questions),
        "split": options.split,
        "data": file_names(options.data),
        "sha256": digest({q.id: [q.question, *q.answers] for q in questions}),
    }
    how = {
        "judge": options.judge,
        "deterministic": options.deterministic,
        "verify": options.verify,
        "dtype": options.dtype,
    }
    header = SearchHeader(
        place.compiled.library.model_fingerprint,
        place.compiled.depth,
        config,
        asked,
        {**{task: template.key for task, template in templates.items()}, **how},
    )
    with RecordStore.open(options.out, header, restart=options.restart) as store:
        if len(store):
            left = len(questions) - len(store)
            status().print(
                f"{options.out} holds {len(store)} questions; {left} are left",
                style="dim",
                markup=False,
            )
        rows = zip(measured_difficulty(questions, measuring, others, place), encoded, strict=True)
        left_rows = [(q, e) for q, e in rows if q.id not in store.done]
        began = time.perf_counter()
        found = _search(options, workplace, place, left_rows, config) if left_rows else iter(())
        del place
        counts = _append_all(found, store, len(left_rows))
        left = len(left_rows)
    seconds = time.perf_counter() - began
    result = {
        "out": str(options.out),
        "questions": len(questions),
        "searched": left,
        "seconds": seconds,
        "evaluations": counts["evaluations"],
        "evaluations_per_second": counts["evaluations"] / seconds if left else 0.0,
        "right": counts["right"],
        "corrected": counts["corrected"],
        "shorter": counts["shorter"],
    }
    if not options.json:
        print(
            f"{left} questions searched in {seconds:.0f} s, "
            f"{result['evaluations_per_second']:.1f} evaluations/s: {counts['right']} right as "
            f"they are, {counts['corrected']} corrected, {counts['shorter']} with a shorter "
            f"program\npython -m polar_fx analyze {options.out}"
        )
    return result


def _config(options: argparse.Namespace) -> Any:
    from ..judge.verdict import get_reward
    from ..search.config import SearchConfig
    from ..search.methods.registry import get_method

    get_method(options.method)
    get_reward(options.reward)
    kinds = {f.name: getattr(f.type, "__name__", f.type) for f in fields(SearchConfig)}
    values: dict[str, Any] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds:
            raise InputError(
                f"--set {text!r} is no setting; write NAME=VALUE with one of {', '.join(kinds)}"
            )
        try:
            values[name] = _CONVERT[str(kinds[name])](value)
        except (ValueError, KeyError):
            raise InputError(f"--set {text!r}: {value!r} is not of type {kinds[name]}") from None
    return SearchConfig.from_dict(
        {
            "method": options.method,
            "simulations": options.simulations,
            "reward": options.reward,
            "seed": options.seed,
            "nested": options.nested,
            **values,
        }
    )


def _search(
    options: argparse.Namespace,
    workplace: "Workplace",
    place: "OpenWorkplace",
    rows: Any,
    config: Any,
) -> "Iterator[SearchRecord]":
    from ..search.ray_workers import search_on_ray
    from ..search.workers import search_in_processes

    if options.ray is not None:
        return search_on_ray(workplace, rows, config, options.workers, options.ray or None)
    if options.workers > 1:
        return search_in_processes(workplace, rows, config, options.workers)
    return place.search(iter(rows), config)


def _append_all(found: "Iterator[SearchRecord]", store: Any, total: int) -> dict[str, int]:
    """Append records as they come, with rate, time left, and counts."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counts = {"evaluations": 0, "right": 0, "corrected": 0, "shorter": 0}
    began = time.perf_counter()
    bar = Progress(
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=status(),
    )
    with bar:
        line = bar.add_task("searching", total=total, note="")
        for number, record in enumerate(found, 1):
            store.append(record)
            counts["evaluations"] += len(record.explored) + 1
            counts["right"] += record.baseline.correct
            counts["corrected"] += record.is_rescued
            counts["shorter"] += any(p.num_steps < record.depth for p in record.valid)
            rate = counts["evaluations"] / (time.perf_counter() - began)
            note = (
                f"{rate:.1f}/s, {counts['right']} right, {counts['corrected']} corrected, "
                f"{counts['shorter']} shorter"
            )
            bar.update(line, advance=1, note=note)
            if not bar.console.is_terminal and (
                number % max(1, total // 20) == 0 or number == total
            ):
                bar.console.print(
                    f"{number}/{total} questions, {time.perf_counter() - began:.0f} s, {note}"
                )
    return counts
