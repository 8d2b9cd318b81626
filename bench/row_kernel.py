"""The linear layers of SmolLM2-135M alone, at several numbers of rows: sums of products for one
row, the kernel, and the library's product.

    python bench/row_kernel.py                    # fp32, one thread, its CPU time
    python bench/row_kernel.py --dtype bfloat16 --threads 2 --rows 8 16

One thread is timed by the CPU time it used, so that a busy machine disturbs little; several by the
clock. Each round times every case once, in a shuffled order, over more weights than caches hold.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from measure import RESULTS, machine, paired_ratio, spread, write, write_json
from polar_fx.backends import InductorBackend
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.passes.base import Pass
from polar_fx.passes.matvec_to_reduction import MatvecToReduction

# Rows and columns of a weight, and how many of them a decoded token reads.
SHAPES = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30, (49152, 576): 1}
BYTES = 100_000_000  # of weights of one shape

Multiply = Callable[[Tensor, Tensor], Any]


class _Linear(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)


def region(rows: int, weight: Tensor, *, passes: Sequence[Pass] = REGION_PASSES) -> Multiply:
    """A linear compiled as in a region: for one row, or for any number of several."""
    body: Any = _Linear()
    example = [weight.new_ones(rows, 1, weight.shape[1]), weight]
    backend = InductorBackend({}, passes)
    made = backend.compile_region(body, example, [{} if rows == 1 else {0: "batch"}, {}])
    return lambda x, weight: made([x, weight])


def cases_of(shape: tuple[int, int], rows: Sequence[int], *, weight: Tensor) -> dict[str, Any]:
    """What is timed for a shape: a callable and its x [B, 1, K]."""
    one = region(1, weight, passes=[MatvecToReduction()])
    kernel_of_one, several = region(1, weight), region(3, weight)
    x = weight.new_ones(1, 1, shape[1])
    found: dict[str, Any] = {"1 reductions": (one, x), "1 kernel": (kernel_of_one, x)}
    for count in rows:
        x = weight.new_ones(count, 1, shape[1])
        found |= {f"{count} kernel": (several, x), f"{count} library": (linear, x)}
    return found


@torch.no_grad()
def measure_all(options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of all linears of a decoded step in each round, by case."""
    dtype = getattr(torch, options.dtype)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    samples: dict[str, list[float]] = {}
    order = random.Random(0)
    for shape, times in SHAPES.items():
        count = max(2, BYTES // (shape[0] * shape[1] * dtype.itemsize))
        weights = [torch.randn(shape).to(dtype) for _ in range(count)]
        cases = cases_of(shape, options.rows, weight=weights[0])
        for number in range(-1, options.rounds):
            for name in order.sample(list(cases), len(cases)):
                multiply, x = cases[name]
                start = clock()
                for weight in weights:
                    multiply(x, weight)
                spent = 1e3 * (clock() - start) / count * times
                if number >= 0:  # the round before the first warms up
                    mine = samples.setdefault(name, [0.0] * options.rounds)
                    mine[number] += spent
    return samples


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    about = report["machine"]
    lines = [
        f"All linears of a decoded step of SmolLM2-135M, {report['dtype']}; {about['cpu']}, "
        f"{about['threads']} threads, {report['clock']}, torch {about['torch']}, commit "
        f"{about['commit']}, load of the machine {about['load_average']:.1f}; {report['rounds']} "
        "interleaved rounds, medians [quartiles].",
        "",
        "| rows | ms | of one row |",
        "|---|---|---|",
    ]
    for name in sorted(report["cases"], key=lambda name: (int(name.split()[0]), name)):
        case = report["cases"][name]
        ms, ratio = case["ms"], case["to_one_row"]
        lines.append(
            f"| {name} | {ms['median']:.1f} [{ms['p25']:.1f}, {ms['p75']:.1f}] | "
            f"{ratio['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    if min(options.rows) < 2:
        parser.error(f"--rows must be at least 2, got {min(options.rows)}: one row is always run")
    torch.set_num_threads(options.threads)
    samples = measure_all(options)
    report = {
        "benchmark": "row_kernel",
        "dtype": options.dtype,
        "machine": machine(torch.device("cpu")),
        "clock": "CPU time" if options.threads == 1 else "by the clock",
        "rounds": options.rounds,
        "cases": {
            name: {
                "ms": spread(mine),
                "to_one_row": paired_ratio(mine, samples["1 kernel"]),
                "samples_ms": mine,
            }
            for name, mine in samples.items()
        },
    }
    output = options.output or RESULTS / f"row-kernel-cpu-{options.dtype}.json"
    write_json(output, report)
    write(output.with_suffix(".md"), table(report))
    print(table(report))


if __name__ == "__main__":
    main()
