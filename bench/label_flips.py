"""How many verdicts change when they are asked for again: in other batches, run alone, or by real generation.

    python bench/label_flips.py                       # float32
    python bench/label_flips.py --dtype bfloat16

The pairs are what Monte Carlo tree searches look at. Replications report 5 to 13 % in bf16, from batch shapes alone.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import polar_fx
from measure import RESULTS, machine, write_json
from polar_fx.evaluate import generate, get_template
from polar_fx.search import SearchConfig, TeacherForcing, Verdict, run_searches
from search_speed import Pair, Plain


def flips(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Verdicts that differ: all of them, and among those that were right at first."""
    changed = [a != b for a, b in zip(first, second, strict=True)]
    right = [c for c, a in zip(changed, first, strict=True) if a]
    return {"n": len(changed), "flips": sum(changed), "right_at_first": len(right), "right_flipped": sum(right)}


def judge(forcing: TeacherForcing, pairs: list[Pair], seed: int, size: int) -> list[Verdict]:
    """Verdicts in the order of `pairs`, judged in another order, `size` at a time."""
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    found: dict[int, Verdict] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        found |= dict(zip(part, forcing.evaluate([pairs[i] for i in part]), strict=True))
    return [found[i] for i in range(len(pairs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="multiplication")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--simulations", type=int, default=40)
    parser.add_argument("--generated", type=int, default=96, help="pairs that are generated as well")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = polar_fx.load(None, getattr(torch, options.dtype))
    compiled = polar_fx.compile(model, max_length=127)
    template = get_template("few-shot", options.task)
    rows = generate(options.task, options.questions, split="train")
    encoded = dict(zip([q.id for q in rows], template.encode_all(tokenizer, rows), strict=True))
    # the likelihood leads to right answers and near ones: where verdicts are close
    config = SearchConfig(simulations=options.simulations, reward="likelihood", length_penalty=0.0)
    records = list(run_searches([(q, encoded[q.id]) for q in rows], TeacherForcing(compiled), compiled.depth, config))
    pairs = [(encoded[r.question.id], e.program) for r in records for e in r.explored]
    first = [e.verdict.correct for r in records for e in r.explored]
    alone = judge(TeacherForcing(compiled, deterministic=True), pairs, 1, 64)
    again = judge(TeacherForcing(compiled, deterministic=True), pairs, 2, 7)
    batched = judge(TeacherForcing(compiled), pairs, 3, 64)
    sample = random.Random(0).sample(range(len(pairs)), min(options.generated, len(pairs)))
    generated = Plain(model, tokenizer, template).evaluate([pairs[i] for i in sample])
    right = [v.correct for v in alone]
    report = {
        "benchmark": "label flips", "dtype": options.dtype, "machine": machine(torch.device("cpu")), "task": options.task,
        "questions": len(rows), "pairs": len(pairs),
        "deterministic, asked again in another order": {
            **flips(right, [v.correct for v in again]), "same_bits": sum(a == b for a, b in zip(alone, again, strict=True))
        },
        "batched, asked again in other batches": flips(first, [v.correct for v in batched]),
        "batched against deterministic": flips(first, right),
        "deterministic against HF generate": flips([right[i] for i in sample], generated),
        "batched against HF generate": flips([first[i] for i in sample], generated),
    }  # fmt: skip
    write_json(options.output or RESULTS / f"label-flips-cpu-{options.dtype}.json", report)
    for name, found in report.items():
        if isinstance(found, dict) and "flips" in found:
            print(f"{name}: {found}")


if __name__ == "__main__":
    main()
