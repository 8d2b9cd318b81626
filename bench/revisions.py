"""Decode and prefill of several checkouts of the project, in turns, each time in a process of its
own.

    git worktree add ../before COMMIT
    python bench/revisions.py before=../before now=. --output bench/results/house-cpu.json

Every round runs each checkout once, in a shuffled order: `generate` of one token and of several
after one prompt, by the default backend, from regions that a first process compiled. Ratios are
taken within rounds, to the checkout named first. Shape legend: T tokens.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from measure import RESULTS, machine, paired_ratio, spread, write_json

_CHILD = """
import json, statistics, sys, time
import torch, polar_fx
dtype, threads, prompt, tokens, repeats = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model, _ = polar_fx.load(None, getattr(torch, dtype))
compiled = polar_fx.compile(model, max_length=511)
ids = torch.arange(1, prompt + 1)[None]
def seconds(new):
    start = time.perf_counter()
    compiled.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return time.perf_counter() - start
seconds(3)
first, all_ = zip(*[(seconds(1), seconds(tokens + 1)) for _ in range(repeats)])
decode = [(b - a) / tokens * 1e3 for a, b in zip(first, all_)]
print(json.dumps({"prefill": statistics.median(first) * 1e3, "decode": statistics.median(decode)}))
"""


def measured(folder: Path, dtype: str, *, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a prefill and of a decoded token, each the median of one process."""
    numbers = (options.threads, options.prompt_tokens, options.tokens, options.repeats)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, dtype, *map(str, numbers)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(folder: Path) -> str:
    """The commit that is checked out there."""
    return subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def compare(
    places: dict[str, Path], dtype: str, *, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Times and ratios to the first checkout, by checkout and kind of call."""
    for folder in places.values():  # compiles what is missing
        measured(folder, dtype, options=options)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    order = list(places)
    for number in range(options.rounds):
        random.Random(number).shuffle(order)
        for name in order:
            times[name].append(measured(places[name], dtype, options=options))
        print(f"{dtype}: round {number + 1} of {options.rounds}", file=sys.stderr)
    base, found = next(iter(places)), {}
    for name in places:
        for kind in ("prefill", "decode"):
            own = [t[kind] for t in times[name]]
            ratio = paired_ratio(own, [t[kind] for t in times[base]])
            found[f"{name} {kind}"] = {"ms": spread(own), "ratio": ratio, "each_ms": own}
            print(f"{dtype} {name:8} {kind:8} {statistics.median(own):8.2f} ms  {ratio}")
    return found


def main() -> None:
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("checkouts", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48, help="decoded tokens a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements a process")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS / "revisions.json")
    options = parser.parse_args()
    places: dict[str, Path] = {}
    for text in options.checkouts:
        name, _, folder = text.partition("=")
        places[name] = Path(folder).resolve()
    settings = {k: v for k, v in vars(options).items() if k not in ("checkouts", "output")}
    commits = {name: commit_of(folder) for name, folder in places.items()}
    report = {
        "benchmark": "revisions",
        "machine": machine(torch.device("cpu")),
        "settings": settings,
        "commits": commits,
        "results": {
            dtype: compare(places, dtype, options=options) for dtype in ("bfloat16", "float32")
        },
    }
    write_json(options.output, report)


if __name__ == "__main__":
    main()
