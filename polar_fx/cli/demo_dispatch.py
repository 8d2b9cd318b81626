"""The demo's questions, each answered by the program that the shipped predictor chooses for it,
beside the model itself.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..errors import InputError
from .options import compile_model, load_model, row_length, warm_up
from .verbosity import status

NEW_TOKENS = 16
_HF, _IDENTITY, _DISPATCH = "the model itself (HF eager)", "compiled, identity", "dispatched"


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Ask test questions drawn anew; returns and prints programs, answers, times, and what the
    predictor's test said.
    """
    from ..backends import get_backend
    from ..predictor.shipped import DEFAULT, DTYPE, about

    if options.dtype not in (None, DTYPE):
        raise InputError(
            f"the shipped predictor is for {DTYPE}, not {options.dtype}; leave --dtype out, or "
            "name programs by --program"
        )
    get_backend(options.backend)
    options.dtype = DTYPE
    notes = about()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    model, tokenizer = load_model(options)
    asked = _asked(tokenizer, notes["tasks"], count=options.questions, seed=seed)
    encoded = [each["encoded"] for each in asked]
    longest = max(len(e.prefix) + len(e.prompt) for e in encoded) + NEW_TOKENS
    compiled = compile_model(model, options, max_length=row_length(model, longest))
    compiled.dispatch_by(DEFAULT)
    compile_s = warm_up(compiled, None)
    ways: dict[str, Callable[..., Any]] = {
        _HF: model.generate,
        _IDENTITY: lambda ids, **more: compiled.generate(ids, program="identity", **more),
        _DISPATCH: compiled.dispatch,
    }
    for generate in ways.values():
        _answer(generate, tokenizer, asked=asked[0])  # warm up; not counted
    for each in track(asked, "questions", console=status(), transient=True):
        each["answers"] = {
            name: _answer(generate, tokenizer, asked=each) for name, generate in ways.items()
        }
    report = _report(asked, {"seed": seed, "compile_s": compile_s, "backend": options.backend})
    report["test"] = notes["test"]
    if not options.json:
        _show(report)
    return report


def _asked(tokenizer: Any, tasks: list[str], *, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of the test split, as many of each task, in its few-shot prompt."""
    from ..jobs.questions import Asked

    asked = Asked(tasks=tuple(tasks), count=count, split="test", seed=seed)
    questions = asked.questions()
    templates = asked.templates(questions)
    found = []
    for question in questions:
        template = templates[question.task]
        encoded = template.encode(tokenizer, question)
        found.append(
            {
                "task": question.task,
                "question": question.question,
                "right": list(question.answers),
                "encoded": encoded,
                "stop": template.decode_stop(tokenizer),
            }
        )
    return found


def _answer(
    generate: Callable[..., Any], tokenizer: Any, *, asked: dict[str, Any]
) -> dict[str, Any]:
    """The greedy answer up to its stop, how long it took, and what was run, if that was chosen."""
    from ..judge.by_generation import generate_arguments
    from .stopwatch import Stopwatch

    watch, stop = Stopwatch(), replace(asked["stop"], max_new_tokens=NEW_TOKENS)
    ids, arguments = generate_arguments([asked["encoded"]], tokenizer, stop=stop)
    out = generate(ids, do_sample=False, streamer=watch, **arguments)
    decision = None
    if isinstance(out, tuple):
        out, told = out
        decision = told.decisions[0]
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    text = text.partition(stop.strings[0])[0].strip()
    return {
        "text": text,
        "right": text in asked["right"],
        "prefill_ms": watch.prefill_ms,
        "token_ms": watch.token_ms,
        "program": None if decision is None else str(decision.program),
        "words": None if decision is None else decision.program.words,
        "steps": None if decision is None else decision.program.num_steps,
        "probability": None if decision is None else decision.probability,
    }


def _report(asked: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """JSON values: questions, and of each way its right answers and median times."""
    ways = {}
    for name in (_HF, _IDENTITY, _DISPATCH):
        answers = [each["answers"][name] for each in asked]
        ways[name] = {
            "right": sum(a["right"] for a in answers),
            "prefill_ms": _median(answers, "prefill_ms"),
            "token_ms": _median(answers, "token_ms"),
        }
    questions = [
        {
            "task": each["task"],
            "question": each["question"],
            "right": each["right"],
            "answers": each["answers"],
        }
        for each in asked
    ]
    return {**facts, "questions": questions, "ways": ways}


def _median(answers: list[dict[str, Any]], key: str) -> float | None:
    """Of the answers that have it."""
    known = [answer[key] for answer in answers if answer[key] is not None]
    return statistics.median(known) if known else None


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    columns = ("task", "question", "program chosen", "steps", "answer", "own answer", "right")
    table = Table(*columns, title=f"Test questions drawn with --seed {report['seed']}")
    for each in report["questions"]:
        own, dispatched = each["answers"][_HF], each["answers"][_DISPATCH]
        table.add_row(
            each["task"],
            each["question"] if len(each["question"]) <= 40 else each["question"][:37] + "...",
            dispatched["words"],
            str(dispatched["steps"]),
            _marked(dispatched),
            _marked(own),
            each["right"][0],
        )
    console.print(table)
    total = len(report["questions"])
    for name, way in report["ways"].items():
        token = "" if way["token_ms"] is None else f", {way['token_ms']:.1f} ms a token"
        console.print(
            f"{name}: {way['right']} of {total} right, prefill {way['prefill_ms']:.0f} ms{token}"
        )
    console.print(f"{total} questions show how it works and tell no accuracy. Its test does:")
    for row in report["test"]["rows"]:
        gain = row["gain"]
        console.print(
            f"  {row['task']}, n = {row['n']}: {row['identity']:.1f} % by the identity, "
            f"{gain['value']:+.1f} points [{gain['low']:+.1f}, {gain['high']:+.1f}] dispatched, at "
            f"{row['steps']:.1f} % of its steps"
        )


def _marked(answer: dict[str, Any]) -> str:
    color = "green" if answer["right"] else "red"
    return f"[{color}]{answer['text'] or '(nothing)'}[/]"
