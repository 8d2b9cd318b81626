"""Attention over keys and values in blocks alone: the kernel, in pages of 2 MB and of 4 KB, and
what stands in for it where there is none: reductions for one token a row, torch's kernel for
several.

    python bench/attention.py                     # fp32
    python bench/attention.py --dtype bfloat16 --rounds 5

Each round times every way once, in a shuffled order, over as many parts of a store as caches do not
hold. Shape legend: B rows, T tokens of each, L columns, H heads of keys, G heads of the query for
each, E size of a head, C columns of a block.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from measure import RESULTS, machine, paired_ratio, spread
from polar_fx import huge_pages
from polar_fx.backends import AotInductorBackend
from polar_fx.passes.address_kv import BLOCK
from polar_fx.passes.attention_over_blocks import AttentionOverBlocks
from polar_fx.passes.attention_to_reduction import AttentionToReduction
from polar_fx.passes.base import Pass
from small_batches import write_report

# H, G and E
MODELS = {"SmolLM2-135M": (3, 3, 64), "Gemma 3 270M": (1, 4, 256), "heads of their own": (8, 1, 64)}
# B, T and L, and how many columns all rows but the first see, if that is another number
Case = tuple[int, int, int, int | None]
_TOKENS: tuple[Case, ...] = tuple(itertools.product((1, 8), (1,), (128, 512, 2048), (None,)))
_PROMPTS: tuple[Case, ...] = (
    (1, 128, 128, None),
    (1, 512, 512, None),
    (1, 512, 1024, None),
    (1, 16, 2048, None),
    (1, 512, 2048, None),
    (8, 64, 64, None),
)
CASES = (*_TOKENS, (8, 1, 2048, 64), *_PROMPTS)
# Of the operands, the axes that may vary
AXES: tuple[dict[int, str], ...] = (
    {0: "batch", 1: "tokens"},
    {0: "stored"},
    {0: "stored"},
    {0: "batch", 1: "blocks"},
    {0: "batch", 2: "tokens", 3: f"{BLOCK}*blocks"},
)
KERNEL, SMALL, OTHER = "kernel", "kernel, small pages", "without"
BYTES = 60_000_000  # of keys and values that the parts of a store have together
MOST_PARTS = 30

Run = Callable[[list[Tensor]], Any]


class _Attention(torch.nn.Module):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, mask: Tensor
    ) -> Tensor:
        keys, values = (
            store[blocks].permute(0, 2, 1, 3, 4).flatten(2, 3) for store in (key, value)
        )
        return scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
        )


def stores(heads: int, size: int, *, blocks: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values [P, H, C, E]."""
    made = [huge_pages.zeros((blocks, heads, BLOCK, size), dtype=dtype) for _ in range(2)]
    return [store.normal_() for store in made]


def operands(
    model: tuple[int, int, int], case: Case, *, dtype: torch.dtype
) -> dict[str, list[list[Tensor]]]:
    """What each way is called with, once for every part of a store."""
    (heads, groups, size), (rows, tokens, length, short) = model, case
    width = length // BLOCK
    num_bytes = 2 * rows * length * heads * size * dtype.itemsize
    parts = max(1, min(MOST_PARTS, BYTES // num_bytes))
    blocks = parts * rows * width
    large = stores(heads, size, blocks=blocks, dtype=dtype)
    with mock.patch.object(huge_pages, "page_size", return_value=None):
        small = stores(heads, size, blocks=blocks, dtype=dtype)
    query = torch.randn(rows, tokens, heads * groups, size).to(dtype)
    seen = torch.arange(length) <= torch.arange(length - tokens, length)[:, None]
    mask = seen.expand(rows, 1, tokens, length).contiguous()
    if short is not None:
        mask[1:, ..., short:] = False
    tables = torch.arange(blocks).view(parts, rows, width)

    def calls(held: list[Tensor]) -> list[list[Tensor]]:
        return [[query, *held, table, mask] for table in tables]

    return {KERNEL: calls(large), SMALL: calls(small), OTHER: calls(large)}


def regions(
    model: tuple[int, int, int], rows: int, *, one_token: bool, dtype: torch.dtype
) -> dict[str, Run]:
    """Each way, compiled as in a region for one row or several, and one token or any number."""
    case = rows, 1 if one_token else 5, 2 * BLOCK, None
    (example, *_) = operands(model, case, dtype=dtype)[KERNEL]
    fixed = {"batch"} if rows == 1 else set[str]()
    fixed |= {"tokens"} if one_token else set()
    dynamic: list[dict[int, str]] = []
    for axes in AXES:
        dynamic.append({axis: name for axis, name in axes.items() if name not in fixed})
    body: Any = torch.fx.symbolic_trace(_Attention())

    def compiled(*passes: Pass) -> Run:
        return AotInductorBackend(passes=passes).compile_region(body, example, dynamic)

    kernel = compiled(AttentionOverBlocks())
    return {KERNEL: kernel, SMALL: kernel, OTHER: compiled(AttentionToReduction())}


@torch.no_grad()
def timed_rounds(
    ways: dict[str, Run], given: dict[str, list[list[Tensor]]], *, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of a call of each way, in each round."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for number in range(-1, rounds):
        for name in order.sample(list(ways), len(ways)):
            run, calls = ways[name], given[name]
            start = time.perf_counter()
            for each in calls:
                run(list(each))
            if number >= 0:  # the round before the first warms up
                samples[name].append(1e3 * (time.perf_counter() - start) / len(calls))
    return samples


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case of every model."""
    dtype = getattr(torch, options.dtype)
    found: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        made: dict[tuple[bool, bool], dict[str, Run]] = {}
        for case in CASES:
            rows, tokens, length, short = case
            kind = rows == 1, tokens == 1
            if kind not in made:
                made[kind] = regions(model, rows, one_token=tokens == 1, dtype=dtype)
            given = operands(model, case, dtype=dtype)
            samples = timed_rounds(made[kind], given, rounds=options.rounds)
            found.append({"model": name, "rows": rows, "tokens": tokens, "columns": length})
            found[-1]["columns_of_others"] = short
            found[-1]["ms"] = {way: spread(mine) for way, mine in samples.items()}
            found[-1]["of_without"] = {
                way: paired_ratio(mine, samples[OTHER]) for way, mine in samples.items()
            }
            found[-1]["samples_ms"] = samples
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    about = report["machine"]
    lines = [
        f"Attention of one layer, {report['dtype']}; {about['cpu']}, {about['threads']} threads, "
        f"torch {about['torch']}, commit {about['commit']}, load of the machine "
        f"{about['load_average']:.1f}; {report['rounds']} interleaved rounds, medians; ratios of "
        "the same rounds.",
        "",
        "| heads of | rows | tokens | columns | without, ms | kernel, ms | of without | in small "
        "pages |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        ms, ratio = case["ms"], case["of_without"]
        others = case["columns_of_others"]
        columns = case["columns"] if others is None else f"{case['columns']}, others {others}"
        lines.append(
            f"| {case['model']} | {case['rows']} | {case['tokens']} | {columns} | "
            f"{ms[OTHER]['median']:.3f} | {ms[KERNEL]['median']:.3f} | "
            f"{ratio[KERNEL]['median']:.2f} | {ratio[SMALL]['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = {
        "benchmark": "attention",
        "dtype": options.dtype,
        "machine": machine(torch.device("cpu")),
        "rounds": options.rounds,
        "cases": measure_all(options),
    }
    output = options.output or RESULTS / f"attention-cpu-{options.dtype}.json"
    write_report(output, report, table=table(report))


if __name__ == "__main__":
    main()
