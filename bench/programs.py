"""Many programs on one set of regions: time until ready, compilations, and memory.

    python bench/programs.py  # SmolLM2-135M-Instruct, 100 programs ready, then 1,000 run
    python bench/programs.py --run 200

A first program is captured, compiled and linked with nothing cached; then further random programs
are made ready; then many different ones decode, while compilations and resident memory are watched.
"""

import argparse
import gc
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch._inductor.utils import fresh_cache

import polar_fx
from measure import RESULTS, machine, spread, write_json
from polar_fx import CompiledModel, Program
from polar_fx.backends import ShapeClass
from polar_fx.store import ArtifactStore


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def random_program(pick: random.Random, depth: int) -> Program:
    """Skips and repeats in random places, or any order of layers at all."""
    if pick.random() < 0.5:
        return Program.from_path(
            tuple(pick.randrange(depth) for _ in range(pick.randint(1, 2 * depth))), depth
        )
    program = Program.identity(depth)
    for _ in range(pick.randint(1, 4)):
        length = pick.randint(1, 4)
        at = pick.randrange(program.num_steps - length)
        program = program.skip(at, length) if pick.random() < 0.5 else program.repeat(at, length, 2)
        if program.num_steps > 2 * depth or program.num_steps < 8:
            break
    return program


def make_ready(compiled: CompiledModel, program: Program) -> None:
    """Link a program for prefill and decode, compiling what is missing."""
    length = compiled.pool.length
    compiled.linker.link(program, ShapeClass.of(1, 128, length), every=False)


@torch.no_grad()
def run_many(
    compiled: CompiledModel, pick: random.Random, *, count: int, tokens: int, console: Console
) -> dict[str, Any]:
    """Generate a few tokens with `count` different programs; memory after the first ten is where
    growth counts from.
    """
    seen: set[Program] = set()
    before, start_bytes = len(compiled.compilations), 0
    longest = Program.identity(compiled.depth).repeat(0, compiled.depth, 2)
    bytes_over_time: list[int] = []
    work = track(range(count), description=f"{count} programs", console=console)
    for number in work:
        program = random_program(pick, compiled.depth) if number else longest
        while program in seen:
            program = random_program(pick, compiled.depth)
        seen.add(program)
        ids = torch.randint(0, 1000, (1, pick.randint(2, tokens)))
        with compiled.session(program, 1) as session:
            token = compiled.prefill(program, session, list(ids))[0].argmax()[None]
            for _ in range(2):
                token = compiled.decode(program, session, token).argmax(-1)
        if number == 9:
            gc.collect()
            start_bytes = resident_bytes()
        if number >= 9 and number % 10 == 9:
            bytes_over_time.append(resident_bytes())
    gc.collect()
    end = resident_bytes()
    return {
        "programs": len(seen),
        "compilations": len(compiled.compilations) - before,
        "resident_bytes_after_10": start_bytes,
        "resident_bytes_at_end": end,
        "growth": end / start_bytes - 1,
        "resident_bytes": bytes_over_time,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ready", type=int, default=100, help="programs made ready")
    parser.add_argument("--run", type=int, default=1000, help="programs run")
    parser.add_argument("--output", type=Path, default=RESULTS / "programs-cpu.json")
    options = parser.parse_args()
    model, _ = polar_fx.load(dtype=getattr(torch, options.dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pick = random.Random(0)
    with fresh_cache(), tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compiled = polar_fx.compile(model, max_length=255, cache=ArtifactStore(Path(folder)))
        make_ready(compiled, compiled.default_program)
        first_s = time.perf_counter() - start
        compiled.warmup()
        before_bytes, samples = resident_bytes(), []
        for _ in range(options.ready - 1):
            start = time.perf_counter()
            make_ready(compiled, random_program(pick, compiled.depth))
            samples.append(1e3 * (time.perf_counter() - start))
        report = {
            "benchmark": "programs",
            "model": polar_fx.models.DEFAULT_NAME,
            "dtype": options.dtype,
            "machine": machine(torch.device("cpu")),
            "first_program_s": first_s,
            "further_ms": spread(samples),
            "further_max_ms": max(samples),
            "all_ready_over_first": (first_s + sum(samples) / 1e3) / first_s,
            "weights_bytes": weights,
            "memory_of_ready_programs": (resident_bytes() - before_bytes) / weights,
            "regions": len(compiled.compilations),
            "run": run_many(
                compiled, pick, count=options.run, tokens=64, console=Console(stderr=True)
            ),
        }
    write_json(options.output, report)
    run = report["run"]
    print(
        f"first program {first_s:.1f} s; {options.ready - 1} further: median "
        f"{report['further_ms']['median']:.2f} ms, at most {report['further_max_ms']:.2f} ms; all "
        f"ready in {report['all_ready_over_first']:.3f} x the first; memory "
        f"{100 * report['memory_of_ready_programs']:+.2f} % of the weights\n{run['programs']} "
        f"programs run: {run['compilations']} compilations, resident memory "
        f"{100 * run['growth']:+.2f} %",
        file=sys.stdout,
    )


if __name__ == "__main__":
    main()
