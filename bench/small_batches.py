"""Decoding of several rows at a time: HF eager, polar_fx, and polar_fx as it was before one of the
things that make it faster: its kernel for linears, huge pages, oneDNN for float32 prompts, its
kernels for attention or for experts, or arrays on the stack.

    python bench/small_batches.py                     # SmolLM2-135M-Instruct, fp32
    python bench/small_batches.py --dtype bfloat16 --without pages
    python bench/small_batches.py --without onednn --rows 1 --prompt-tokens 512
    python bench/small_batches.py --without attention --rows 1 --prompt-tokens 2048
    python bench/small_batches.py --without stack --rows 1
    python bench/small_batches.py --without experts   # a mixture of experts, random weights
    python bench/small_batches.py --rows 1 8 --rounds 4 --tokens 6  # a quick look
    python bench/small_batches.py --threads 1 --in-process --prompt-tokens 1  # on a busy machine

Every round runs each contender at each number of rows once, in a shuffled order, in one process:
prefill of the prompts, then decoding of the following tokens. One thread is timed by the CPU time
it used, so that a busy machine disturbs little; several by the clock. Shape legend: B rows, T
tokens.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

import polar_fx
from contenders import Contender, HfEager, Ours
from measure import RESULTS, bandwidth_gbs, machine, paired_ratio, spread, write, write_json
from polar_fx import huge_pages
from polar_fx.backends import AotInductorBackend, InductorBackend
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.models import DEFAULT_NAME
from polar_fx.passes.attention_over_blocks import AttentionOverBlocks
from polar_fx.passes.base import Pass
from polar_fx.passes.grouped_linear import GroupedLinear
from polar_fx.passes.linear_to_onednn import LinearToOneDnn
from polar_fx.passes.linear_to_row_kernel import LinearToRowKernel
from polar_fx.store import ArtifactStore

CPU = torch.device("cpu")
AFTER, BEFORE, HF = "polar_fx", "before", "HF eager"
EXPERTS = "OLMoE-1B-7B's sizes, 4 of its 16 layers, random weights"
# What is left out before: passes, or something else. The kernel for linears calls oneDNN, too;
# without it one row is left to sums of products.
WITHOUT: dict[str, tuple[type[Pass], ...]] = {
    "kernel": (LinearToRowKernel,),
    "onednn": (LinearToOneDnn, LinearToRowKernel),
    "attention": (AttentionOverBlocks,),
    "experts": (GroupedLinear,),
    "pages": (),
    "stack": (),
}
ON_THE_HEAP = {"aot_inductor.allow_stack_allocation": False}


def _timed(work: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return 1e3 * (clock() - start)


# Of a contender at a number of rows: milliseconds of each round.
Samples = dict[tuple[str, int], dict[str, list[float]]]


@torch.no_grad()
def run_rounds(
    contenders: dict[str, Contender],
    prompts: Tensor,
    *,
    rows: Sequence[int],
    tokens: int,
    rounds: int,
) -> Samples:
    """One prefill time a round of prompts i64[B, T], and the round's median decode time of a
    step.
    """
    following = torch.randint(
        0, 1000, (tokens, len(prompts), 1), generator=torch.Generator().manual_seed(1)
    )
    cases = [(name, count) for name in contenders for count in rows]
    samples: Samples = {case: {"prefill": [], "decode": []} for case in cases}
    order = random.Random(0)
    console = Console(stderr=True)
    for _ in track(range(rounds), description="rounds", console=console):
        for name, count in order.sample(cases, len(cases)):
            contender, ids = contenders[name], prompts[:count]
            times = samples[name, count]
            times["prefill"].append(_timed(lambda c=contender, i=ids: c.prefill(i)))
            each = [_timed(lambda c=contender, t=token[:count]: c.decode(t)) for token in following]
            times["decode"].append(statistics.median(each))
            contender.finish()
    return samples


@torch.no_grad()
def differences(contenders: dict[str, Contender], prompts: Tensor) -> dict[str, float]:
    """Largest absolute difference of the logits of a decoded token to HF eager's."""
    logits = {}
    for name, contender in contenders.items():
        contender.prefill(prompts)
        logits[name] = contender.decode(prompts[:, :1]).clone().float()
        contender.finish()
    return {name: float((value - logits[HF]).abs().max()) for name, value in logits.items()}


def rows_of(samples: Samples) -> list[dict[str, Any]]:
    """What the report says of each contender at each number of rows; ratios are of the same
    round.
    """
    return [
        {
            "name": name,
            "rows": count,
            "decode_ms": spread(mine["decode"]),
            "prefill_ms": spread(mine["prefill"]),
            "to_one_row": paired_ratio(mine["decode"], samples[name, 1]["decode"]),
            "to_hf": paired_ratio(mine["decode"], samples[HF, count]["decode"]),
            "prefill_to_before": paired_ratio(mine["prefill"], samples[BEFORE, count]["prefill"]),
            "samples_ms": mine,
        }
        for (name, count), mine in samples.items()
    ]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    about = report["machine"]
    lines = [
        f"{report['model']}, {report['dtype']}, before: {report['before']}; prompts of "
        f"{report['prompt_tokens']} tokens; "
        f"{about['cpu']}, {about['threads']} threads, {report['clock']}, torch "
        f"{about['torch']}, commit {about['commit']}; {report['rounds']} interleaved "
        "rounds, medians [quartiles]. Load of "
        f"the machine before and after: {report['load_average'][0]:.1f}, "
        f"{report['load_average'][1]:.1f}.",
        "",
        "| rows | | decode ms | of one row | of HF eager | prefill ms | of before |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(report["contenders"], key=lambda r: r["rows"]):
        decode, prefill = row["decode_ms"], row["prefill_ms"]
        lines.append(
            f"| {row['rows']} | {row['name']} | {decode['median']:.1f} [{decode['p25']:.1f}, "
            f"{decode['p75']:.1f}] | {row['to_one_row']['median']:.2f} | "
            f"{row['to_hf']['median']:.2f} | {prefill['median']:.0f} [{prefill['p25']:.0f}, "
            f"{prefill['p75']:.0f}] | {row['prefill_to_before']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def measured(
    contenders: dict[str, Contender], options: argparse.Namespace
) -> tuple[Tensor, Samples]:
    """Prompts i64[B, T] as the options of `add_arguments` ask for them, and what the contenders
    took for them, compiled and warm.
    """
    rows = sorted({1, *options.rows})
    prompts = torch.randint(
        0, 1000, (rows[-1], options.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    start = time.perf_counter()
    run_rounds(contenders, prompts, rows=rows, tokens=2, rounds=2)
    print(f"compiled and warm after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return prompts, run_rounds(
        contenders, prompts, rows=rows, tokens=options.tokens, rounds=options.rounds
    )


def write_report(output: Path, report: dict[str, Any], *, table: str) -> None:
    """Write the JSON file and the table beside it, and show the table."""
    write_json(output, report)
    write(output.with_suffix(".md"), table)
    print(table)


def add_arguments(parser: argparse.ArgumentParser, *, tokens: int) -> None:
    """What is run, how often, and where the results go; so many tokens a round by default."""
    parser.add_argument(
        "--model", help="folder or model id (default: the embedded SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=tokens, help="decoded tokens a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--store", type=Path, help="keep compiled code in this folder")


def _of_experts(options: argparse.Namespace) -> bool:
    return options.without == "experts" and options.model is None


def _model(options: argparse.Namespace) -> PreTrainedModel:
    """The model that the options name; to see what experts cost, one that has some."""
    dtype = getattr(torch, options.dtype)
    if not _of_experts(options):
        return polar_fx.load(options.model, dtype=dtype)[0]
    torch.manual_seed(0)
    config = OlmoeConfig(num_hidden_layers=4)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measure_all(options: argparse.Namespace, store: ArtifactStore) -> None:
    """Run everything the options ask for; writes the report."""
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    model = _model(options)
    backend = InductorBackend if options.in_process else AotInductorBackend
    before = [p for p in REGION_PASSES if not isinstance(p, WITHOUT[options.without])]

    def ours(
        name: str, of: PreTrainedModel, *, passes: Sequence[Pass], given: Mapping[str, Any]
    ) -> Contender:
        compiled = polar_fx.compile(of, backend(given, passes), cache=store, check=False)
        return Ours(compiled, name, program=compiled.default_program)

    contenders: dict[str, Contender] = {HF: HfEager(model)}
    if options.without == "pages":
        with mock.patch.object(huge_pages, "page_size", return_value=None):
            contenders[BEFORE] = ours(BEFORE, model, passes=before, given={})
        model = _model(options)
    else:
        given = ON_THE_HEAP if options.without == "stack" else {}
        contenders[BEFORE] = ours(BEFORE, model, passes=before, given=given)
    contenders[AFTER] = ours(AFTER, model, passes=REGION_PASSES, given={})
    prompts, samples = measured(contenders, options)
    report = {
        "benchmark": "small_batches",
        "model": options.model or (EXPERTS if _of_experts(options) else DEFAULT_NAME),
        "dtype": options.dtype,
        "before": f"without {options.without}",
        "machine": machine(CPU),
        "backend": backend.name,
        "clock": "CPU time" if torch.get_num_threads() == 1 else "by the clock",
        "load_average": [load, os.getloadavg()[0]],
        "prompt_tokens": options.prompt_tokens,
        "decoded_tokens": options.tokens,
        "rounds": options.rounds,
        "bandwidth_by_operator_gbs": bandwidth_gbs(CPU),
        "max_difference_to_hf": differences(contenders, prompts),
        "contenders": rows_of(samples),
    }
    what = "small-batches" if options.without == "kernel" else f"without-{options.without}"
    output = options.output or RESULTS / f"{what}-cpu-{options.dtype}.json"
    write_report(output, report, table=table(report))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, tokens=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--without", choices=tuple(WITHOUT), default="kernel")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="regions by the backend inductor, which compiles sooner and calls more slowly",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure_all(options, ArtifactStore(options.store or Path(place)))


if __name__ == "__main__":
    main()
