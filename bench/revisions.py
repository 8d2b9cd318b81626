"""Decode, prefill and many requests of several checkouts of the project, in turns, each time in a
process of its own.

    git worktree add ../before COMMIT
    python bench/revisions.py before=../before now=. --output bench/results/house-cpu.json

Every round runs each checkout once, in a shuffled order: `generate` of one token and of several
after prompts of one or more rows, by the default backend, from regions that a first process
compiled; with `--quantize`, of a model whose weights are integers. `--requests`
adds the seconds that so many requests of five programs take, all at once: by the engine of a
checkout that has one, in batches of one program in one that has none. Ratios are taken within
rounds, to the checkout named first. Shape legend: B rows, T tokens.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from measure import RESULTS, machine, paired_ratio, spread, write_json

_CHILD = """
import json, statistics, sys, time
import torch, polar_fx
dtype, quantize, (threads, prompt, tokens, repeats, *rows) = *sys.argv[1:3], map(int, sys.argv[3:])
torch.set_num_threads(threads)
ways = {} if quantize == "none" else {"quantize": quantize}
model, _ = polar_fx.load(None, getattr(torch, dtype), **ways)
compiled = polar_fx.compile(model, max_length=511)
def seconds(ids, new):
    start = time.perf_counter()
    compiled.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return time.perf_counter() - start
found = {}
for count in rows:
    ids = torch.arange(1, prompt + 1).repeat(count, 1)
    seconds(ids, 3)
    first, all_ = zip(*[(seconds(ids, 1), seconds(ids, tokens + 1)) for _ in range(repeats)])
    decode = [(b - a) / tokens * 1e3 for a, b in zip(first, all_)]
    kind = "" if count == 1 else f" of {count} rows"
    found["prefill" + kind] = statistics.median(first) * 1e3
    found["decode" + kind] = statistics.median(decode)
print(json.dumps(found))
"""

# Prompts of 8 to 63 tokens, answers of 4 to 48; the second of two runs counts.
_REQUESTS = """
import json, random, sys, time
import torch, polar_fx
from polar_fx import Program
dtype, quantize, threads, count = *sys.argv[1:3], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
ways = {} if quantize == "none" else {"quantize": quantize}
model, _ = polar_fx.load(None, getattr(torch, dtype), **ways)
compiled = polar_fx.compile(model, max_length=512)
own = Program.identity(model.config.num_hidden_layers)
short = own.skip(17, 2)
menu = [own, own.skip(5, 1), short, own.repeat(20, 3, 2), short.repeat(20, 1, 2)]
pick = random.Random(0)
asked = [
    ([pick.randrange(3, 40000) for _ in range(pick.randint(8, 63))], i % 5, pick.randint(4, 48))
    for i in range(count)
]

class First:  # a stopping criterion that notes when a batch has its first tokens
    at = None
    def __call__(self, ids, scores, **_):
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)

def by_batches(start):
    firsts = []
    for program in range(5):
        rows = [a for a in asked if a[1] == program]
        for part in (rows[i : i + 16] for i in range(0, len(rows), 16)):
            width = max(len(ids) for ids, *_ in part)
            ids = torch.tensor([[0] * (width - len(a[0])) + a[0] for a in part])
            mask = torch.tensor([[0] * (width - len(a[0])) + [1] * len(a[0]) for a in part])
            new, first = max(a[2] for a in part), First()
            compiled.generate(
                ids, attention_mask=mask, program=menu[program], max_new_tokens=new,
                eos_token_id=None, do_sample=False, pad_token_id=0, stopping_criteria=[first],
            )
            firsts += [first.at - start] * len(part)
    return firsts

def by_engine(start):
    from polar_fx.engine import Sampling
    engine, firsts, more = compiled.engine(max_rows=16), {}, True
    for ids, program, new in asked:
        firsts[engine.add(ids, menu[program], Sampling(max_new_tokens=new))] = None
    while more:
        more = engine.step()
        for request, at in firsts.items():
            if at is None and request.tokens:
                firsts[request] = time.perf_counter() - start
    return list(firsts.values())

for _ in range(2):
    start = time.perf_counter()
    firsts = sorted((by_engine if hasattr(compiled, "engine") else by_batches)(start))
    seconds = time.perf_counter() - start
print(json.dumps({"requests": seconds * 1e3, "first token": firsts[len(firsts) // 2] * 1e3}))
"""


def measured(
    folder: Path, weights: Sequence[str], *, child: str, numbers: Sequence[int]
) -> dict[str, float]:
    """Milliseconds by kind of call, of one process that runs the code `child`; `weights` are their
    dtype, and how they are quantized.
    """
    done = subprocess.run(
        [sys.executable, "-c", child, *weights, *map(str, numbers)],
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
    weights = (dtype, options.quantize)
    sizes = (options.prompt_tokens, options.tokens, options.repeats, *options.rows)
    work: list[tuple[str, tuple[int, ...]]] = [(_CHILD, (options.threads, *sizes))]
    if options.requests:
        work.append((_REQUESTS, (options.threads, options.requests)))
    for folder in places.values():  # compiles what is missing
        measured(folder, weights, child=_CHILD, numbers=work[0][1])
    times: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    order = list(places)
    for number in range(options.rounds):
        random.Random(number).shuffle(order)
        for name in order:
            times[name].append({})
            for child, numbers in work:
                found = measured(places[name], weights, child=child, numbers=numbers)
                times[name][-1].update(found)
        print(f"{dtype}: round {number + 1} of {options.rounds}", file=sys.stderr)
    base, found = next(iter(places)), {}
    for name in places:
        for kind in times[name][0]:
            own = [t[kind] for t in times[name]]
            ratio = paired_ratio(own, [t[kind] for t in times[base]])
            found[f"{name} {kind}"] = {"ms": spread(own), "ratio": ratio, "each_ms": own}
            print(f"{dtype} {name:8} {kind:18} {statistics.median(own):8.2f} ms  {ratio}")
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
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--requests", type=int, default=0, help="requests at once, of 5 programs")
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
        "results": {dtype: compare(places, dtype, options=options) for dtype in options.dtypes},
    }
    write_json(options.output, report)


if __name__ == "__main__":
    main()
