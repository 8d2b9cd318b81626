"""Answer test questions, each by the program that the predictor in the box chooses for it, beside
the model itself.

The questions are drawn anew each time from those that no training saw, and answers are marked
afterwards. With --program, or another model, fixed questions are answered by fixed programs
instead: those were found by trying single edits on one-digit products, these among them, so that
their counts show that programs answer differently, and what they cost, and are no estimate of
accuracy.

Examples:
  python -m polar_fx demo
  python -m polar_fx demo --questions 40 --seed 1
  python -m polar_fx demo --program "skip 5" --backend eager --questions 4
"""

import argparse
import functools
import statistics
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .options import (
    add_model_arguments,
    compile_model,
    load_model,
    row_length,
    warm_up,
    whole,
)
from .threads import warn_if_busy
from .verbosity import status

FEW_SHOT = "2 * 3 = 6\n7 * 4 = 28\n5 * 5 = 25\n"
QUESTIONS = (
    (6, 7),
    (3, 9),
    (8, 8),
    (4, 6),
    (9, 5),
    (2, 8),
    (7, 9),
    (3, 4),
    (8, 6),
    (5, 9),
    (6, 6),
    (4, 9),
)
_DISPATCHED = 20  # questions
NEW_TOKENS = 6
HF = "the model itself (HF eager)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--questions",
        type=whole(1),
        metavar="N",
        help=f"(default: {_DISPATCHED}; with --program at most {len(QUESTIONS)})",
    )
    parser.add_argument(
        "--seed", type=whole(0), metavar="N", help="which questions (default: others each time)"
    )
    parser.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="run these programs beside identity instead",
    )
    add_model_arguments(parser, backend="auto")
    parser.set_defaults(dtype=None)  # so that what is given can be told from what is not


def default_programs(depth: int) -> list[str]:
    """Identity; one layer skipped, early and late; one layer run twice; a pair run twice, the
    second time damped.

    The layers are given as shares of the depth, so that any model has them.
    """
    early, middle, late = (round(depth * share) for share in (5 / 30, 14 / 30, 17 / 30))
    return [
        "identity",
        f"skip {early}",
        f"skip {late}",
        f"repeat {middle} x2",
        f"repeat {middle}-{middle + 1} x2 @0.5",
    ]


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Dispatch, or run every program on every question; returns and prints answers and timings."""
    from ..backends import get_backend

    if options.model is None and not options.program:
        from . import demo_dispatch

        options.questions = options.questions or _DISPATCHED
        return demo_dispatch.execute(options)
    get_backend(options.backend)
    options.dtype = options.dtype or "float32"
    model, tokenizer = load_model(options)
    prompts = [f"{FEW_SHOT}{a} * {b} =" for a, b in QUESTIONS[: options.questions]]
    truth = [str(a * b) for a, b in QUESTIONS[: options.questions]]
    encoded = [tokenizer(p, return_tensors="pt").input_ids for p in prompts]
    warn_if_busy()
    compiled = compile_model(
        model, options, max_length=row_length(model, max(e.shape[1] for e in encoded) + NEW_TOKENS)
    )
    texts = dict.fromkeys(
        ["identity", *options.program] if options.program else default_programs(compiled.depth)
    )
    programs = {text: compiled.resolve(text) for text in texts}
    compile_s = warm_up(compiled, programs.values())
    runs: list[dict[str, Any]] = [
        {"program": HF, "steps": compiled.depth, "answers": [], "prefill_ms": [], "token_ms": []}
    ]
    runs += [
        {"program": t, "steps": p.num_steps, "answers": [], "prefill_ms": [], "token_ms": []}
        for t, p in programs.items()
    ]
    work = [
        model.generate,
        *(functools.partial(compiled.generate, program=p) for p in programs.values()),
    ]
    for generate in work:
        _answer(generate, tokenizer, ids=encoded[0])  # warm up; not counted
    for ids in track(encoded, "questions", console=status(), transient=True):
        # taking turns, so that drift of the machine hits all alike
        for run, generate in zip(runs, work, strict=True):
            answer, prefill_ms, token_ms = _answer(generate, tokenizer, ids=ids)
            run["answers"].append(answer)
            run["prefill_ms"].append(prefill_ms)
            run["token_ms"] += [] if token_ms is None else [token_ms]
    for run in runs:
        run["right"] = sum(a == t for a, t in zip(run["answers"], truth, strict=True))
        for key in ("prefill_ms", "token_ms"):
            run[key] = statistics.median(run[key]) if run[key] else None
    report = {
        "questions": [p.splitlines()[-1] for p in prompts],
        "truth": truth,
        "backend": options.backend,
        "compile_s": compile_s,
        "runs": runs,
    }
    if not options.json:
        _show(report)
    return report


def _answer(generate: Any, tokenizer: Any, *, ids: Any) -> tuple[str, float, float | None]:
    """The first line of the greedy continuation, milliseconds to its first token, and from token to
    token.
    """
    from .stopwatch import Stopwatch

    watch = Stopwatch()
    stop = tokenizer.encode("\n", add_special_tokens=False)[-1]
    out = generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
        streamer=watch,
    )
    return (
        tokenizer.decode(out[0, ids.shape[1] :]).strip().partition("\n")[0],
        watch.prefill_ms,
        watch.token_ms,
    )


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(
        "program",
        "steps",
        "prefill ms",
        "ms a token",
        "answers",
        title="Three worked products, then: a * b =",
    )
    for run in report["runs"]:
        marked = [
            f"[green]{a}[/]" if a == t else f"[red]{a}[/]"
            for a, t in zip(run["answers"], report["truth"], strict=True)
        ]
        token = "" if run["token_ms"] is None else f"{run['token_ms']:.1f}"
        table.add_row(
            run["program"], str(run["steps"]), f"{run['prefill_ms']:.0f}", token, " ".join(marked)
        )
    table.add_section()
    table.add_row("right answers", "", "", "", " ".join(report["truth"]))
    console.print(table)
    hf, identity, others = report["runs"][0], report["runs"][1], report["runs"][2:]
    console.print(
        f"identity answers {'as' if identity['answers'] == hf['answers'] else 'NOT as'} the model "
        "itself"
    )
    total = len(report["truth"])
    for run in others:
        changed = sum(a != b for a, b in zip(run["answers"], identity["answers"], strict=True))
        rescued = sum(
            a == t != b
            for a, b, t in zip(run["answers"], identity["answers"], report["truth"], strict=True)
        )
        console.print(
            f"{run['program']}: {run['right']} of {total} right, {changed} answers changed, "
            f"{rescued} of them from wrong to right"
        )
    by_question = zip(*(run["answers"] for run in report["runs"]), strict=True)
    solved = sum(t in answers for t, answers in zip(report["truth"], by_question, strict=True))
    console.print(
        f"Identity is right on {identity['right']} of {total} questions; on {solved} at least one "
        "of these programs is. Choosing it in advance is the predictor's job. "
        "n is too small for an accuracy."
    )
