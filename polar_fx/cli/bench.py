"""Measure how long this model takes here: prefill, and a decoded token, beside HuggingFace eager.

All contenders take turns in one run, in an order that is drawn anew each round, so that what else
the machine does falls on all of them alike. Compiling is not part of the times.

Examples:
  python -m polar_fx bench
  python -m polar_fx bench --program identity --program "skip 3-9" --rows 1 --json
  python -m polar_fx bench --threads 1 2             # which number of threads is faster here
  python -m polar_fx bench --model ./my-model --dtype bfloat16 --prompt-tokens 512 --rounds 9
"""

import argparse
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..environment import BUSY, processor_name
from ..errors import InputError
from ..output.plain_text import count, dtype_name, table
from .options import (
    add_length_argument,
    add_model_arguments,
    compile_model,
    load_model,
    row_length,
    warm_up,
    whole,
)
from .threads import advice, load_of_others, on_threads
from .verbosity import status, working

if TYPE_CHECKING:
    from torch import Tensor

    from ..compiled import CompiledModel

HF = "HF eager"

# Takes prompts i64[B, T] and a streamer, and generates.
Generate = Callable[..., Any]
# By phase, "prefill" and "decode": milliseconds, a round each.
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Contender:
    """What takes its turns: steps of its program, compute threads, and whose times it is held
    against, HuggingFace's by as many threads.
    """

    generate: Generate
    steps: int
    threads: int
    beside: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="program text; may be given several times (default: identity)",
    )
    parser.add_argument(
        "--rows",
        type=whole(1),
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="rows at a time (default: 1 8)",
    )
    parser.add_argument(
        "--threads",
        type=whole(1),
        nargs="+",
        metavar="N",
        help="compute threads; several are measured in turns, each compiled for itself (default: "
        "as many as torch takes)",
    )
    for name, default, what in (
        ("--prompt-tokens", 128, "tokens of a prompt"),
        ("--new-tokens", 32, "tokens decoded after it, at least 2"),
        ("--rounds", 5, "rounds, each of which runs every contender once"),
    ):
        least = 2 if name == "--new-tokens" else 1
        parser.add_argument(
            name,
            type=whole(least),
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    add_length_argument(parser, "256, or what prompt and new tokens need")
    add_model_arguments(parser, backend="auto")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns and prints the times."""
    from ..models import is_bundle

    if options.model is not None and is_bundle(options.model):
        raise InputError(
            f"{options.model} is a bundle, which HuggingFace cannot run; name the model it was "
            "exported from"
        )
    import torch

    load, before = load_of_others(), torch.get_num_threads()
    numbers = list(dict.fromkeys(options.threads or [before]))
    model, _ = load_model(options)
    needed = options.prompt_tokens + options.new_tokens - 1  # the last one is never fed back
    length = options.max_length or row_length(model, needed)
    if length < needed:
        raise InputError(
            f"--max-length {length} is too short for --prompt-tokens {options.prompt_tokens} and "
            f"--new-tokens {options.new_tokens}; name at least {needed}"
        )
    try:
        contenders: dict[str, Contender] = {}
        models: list[CompiledModel] = []
        for number in numbers:
            torch.set_num_threads(number)  # compiled code is for so many
            compiled = compile_model(model, options, max_length=length)
            name = f", {count(number, 'thread')}" if len(numbers) > 1 else ""
            contenders |= contenders_of(options, model, compiled=compiled, name=name)
            models.append(compiled)
        lines = [
            line
            for rows in options.rows
            for line in measured(options, contenders, rows=rows, vocab_size=models[0].vocab_size)
        ]
        about = about_run(options, models[0], load=load)
    finally:
        torch.set_num_threads(before)
    if not options.json:
        print("\n".join(text_of(about, lines)))
        if len(numbers) > 1:
            print("\n" + advice(lines, HF))
        if load is not None and load > BUSY:
            status().print(
                f"other processes kept {load:.1f} threads for each core busy: do not trust these "
                "times"
            )
    return {**about, "results": lines}


def contenders_of(
    options: argparse.Namespace, model: Any, *, compiled: "CompiledModel", name: str
) -> dict[str, Contender]:
    """HuggingFace's and each program's, by as many threads as torch has now; `name` ends theirs."""
    import torch

    programs = {text: compiled.resolve(text) for text in options.program or ["identity"]}
    for rows in {min(rows, 2) for rows in options.rows}:
        warm_up(compiled, programs.values(), batch=rows)
    number, theirs = torch.get_num_threads(), HF + name
    found = {theirs: Contender(on_threads(number, _of_hf(model)), compiled.depth, number, theirs)}
    for text, program in programs.items():
        generate = on_threads(number, _of_program(compiled, text))
        found[text + name] = Contender(generate, program.num_steps, number, theirs)
    return found


def about_run(
    options: argparse.Namespace, compiled: "CompiledModel", *, load: float | None
) -> dict[str, Any]:
    """What is measured, where, and how."""
    return {
        "model": compiled.architecture,
        "layers": compiled.depth,
        "dtype": dtype_name(compiled.dtype),
        "backend": compiled.backend.name,
        **_machine(compiled),
        "load_of_others": load,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
    }


def measured(
    options: argparse.Namespace,
    contenders: Mapping[str, Contender],
    *,
    rows: int,
    vocab_size: int,
) -> list[dict[str, Any]]:
    """A line for each contender, for so many rows of drawn tokens."""
    import torch

    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(vocab_size, (rows, options.prompt_tokens), generator=draw)
    with working(f"measuring {count(rows, 'row')} ..."):
        turns = {name: contender.generate for name, contender in contenders.items()}
        samples = run_rounds(turns, ids, tokens=options.new_tokens, rounds=options.rounds)
    return [_line(name, samples, rows=rows, about=about) for name, about in contenders.items()]


def run_rounds(
    contenders: Mapping[str, Generate], ids: "Tensor", *, tokens: int, rounds: int
) -> dict[str, Samples]:
    """Each contender once a round, in an order drawn anew, after a round that warms up.

    `ids` i64[B, T]; each generates `tokens` more. A round's sample of decoding is its median.
    """
    from .stopwatch import Stopwatch

    samples: dict[str, Samples] = {name: {"prefill": [], "decode": []} for name in contenders}
    order = random.Random(0)
    for number in range(1 + rounds):
        for name in order.sample(list(contenders), len(contenders)):
            watch = Stopwatch()
            contenders[name](ids, streamer=watch, max_new_tokens=tokens, min_new_tokens=tokens)
            if number == 0 or watch.token_ms is None:
                continue
            samples[name]["prefill"].append(watch.prefill_ms)
            samples[name]["decode"].append(watch.token_ms)
    return samples


def _of_hf(model: Any) -> Generate:
    import torch

    def generate(ids: "Tensor", **settings: Any) -> None:
        there = ids.to(model.device)
        mask = torch.ones_like(there)
        model.generate(there, attention_mask=mask, do_sample=False, pad_token_id=0, **settings)

    return generate


def _of_program(compiled: "CompiledModel", program: str) -> Generate:
    import torch

    def generate(ids: "Tensor", **settings: Any) -> None:
        compiled.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            program=program,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )

    return generate


def _line(
    name: str, samples: Mapping[str, Samples], *, rows: int, about: Contender
) -> dict[str, Any]:
    """JSON values: medians, every sample, and the median ratio to HuggingFace's of the same
    round.
    """
    line: dict[str, Any] = {"contender": name, "rows": rows, "steps": about.steps}
    line["threads"] = about.threads
    for phase in ("prefill", "decode"):
        mine, theirs = samples[name][phase], samples[about.beside][phase]
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        line[f"{phase}_ms"] = statistics.median(mine)
        line[f"{phase}_of_hf"] = statistics.median(ratios)
        line[f"{phase}_samples_ms"] = mine
    line["tokens_per_s"] = 1e3 * rows / line["decode_ms"]
    return line


def text_of(about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is printed."""

    def spread(line: Mapping[str, Any], phase: str) -> str:
        samples = line[f"{phase}_samples_ms"]
        return f"{line[f'{phase}_ms']:.1f} ({min(samples):.1f}-{max(samples):.1f})"

    rows = [
        (
            line["contender"],
            str(line["rows"]),
            str(line["steps"]),
            spread(line, "prefill"),
            spread(line, "decode"),
            f"{line['tokens_per_s']:.0f}",
            f"{line['prefill_of_hf']:.2f}",
            f"{line['decode_of_hf']:.2f}",
        )
        for line in lines
    ]
    head = (
        "",
        "rows",
        "steps",
        "prefill ms",
        "decode ms",
        "tokens/s",
        "prefill / HF",
        "decode / HF",
    )
    return [
        f"{about['model']}, {count(about['layers'], 'layer')}, {about['dtype']}, backend "
        f"{about['backend']}",
        f"{about['processor']}, {count(about['threads'], 'thread')}, torch {about['torch']}, "
        f"transformers {about['transformers']}",
        f"prompt of {count(about['prompt_tokens'], 'token')}, {about['new_tokens']} more; median "
        f"(least-most) of {count(about['rounds'], 'round')}",
        "",
        *table(head, rows, right=head[1:]),
    ]


def _machine(compiled: "CompiledModel") -> dict[str, Any]:
    import torch
    import transformers

    on_gpu = compiled.device.type == "cuda"
    name = torch.cuda.get_device_name(compiled.device) if on_gpu else processor_name()
    return {
        "device": str(compiled.device),
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
