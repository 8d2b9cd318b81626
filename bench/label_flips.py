"""How many verdicts change when they are asked for again: in other batches, run alone, or by real
generation.

    python bench/label_flips.py                       # float32
    python bench/label_flips.py --dtype bfloat16
    python bench/label_flips.py --dtype bfloat16 --records run.jsonl

The pairs are what Monte Carlo tree searches look at; of the records of a search, half are drawn
from those found right and half are those whose margin is nearest to a tie. Replications report 5 to
13 % in bf16, from batch shapes alone.
"""

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import polar_fx
from measure import RESULTS, machine, write_json
from polar_fx.jobs.questions import encode, templates_of
from polar_fx.questions import Question, generate, get_template
from polar_fx.search import SearchConfig, TeacherForcing, Verdict, run_searches
from polar_fx.search.records.record_file import RecordReader
from polar_fx.search.records.records import Explored
from search_speed import Pair, Plain


def flips(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Verdicts that differ: all of them, and among those that were right at first."""
    changed = [a != b for a, b in zip(first, second, strict=True)]
    right = [c for c, a in zip(changed, first, strict=True) if a]
    return {
        "n": len(changed),
        "flips": sum(changed),
        "right_at_first": len(right),
        "right_flipped": sum(right),
    }


def judge(forcing: TeacherForcing, pairs: list[Pair], *, seed: int, size: int) -> list[Verdict]:
    """Verdicts in the order of `pairs`, judged in another order, `size` at a time."""
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    found: dict[int, Verdict] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        found |= dict(zip(part, forcing.evaluate([pairs[i] for i in part]), strict=True))
    return [found[i] for i in range(len(pairs))]


def by_generation(
    model: Any, tokenizer: Any, *, templates: dict[str, Any], asked: list[tuple[str, Pair]]
) -> list[bool]:
    """Whether plain generation gets each pair right; `asked` has its question's task with it."""
    right = [False] * len(asked)
    for task, template in templates.items():
        members = [i for i, (of, _) in enumerate(asked) if of == task]
        plain = Plain(model, tokenizer, template=template)
        told = plain.evaluate([asked[i][1] for i in members])
        for i, verdict in zip(members, told, strict=True):
            right[i] = verdict
    return right


def labels(verdicts: Iterable[Verdict]) -> list[bool]:
    return [verdict.correct for verdict in verdicts]


def chosen(listed: list[tuple[Question, Explored]], count: int) -> list[tuple[Question, Explored]]:
    """Half of `count` drawn from what was found right, and half of what was nearest to a tie."""
    right = [each for each in listed if each[1].verdict.correct]
    drawn = random.Random(0).sample(right, min(count // 2, len(right)))
    margins = {id(each): abs(each[1].verdict.margin or 0.0) for each in listed}
    taken = {id(each) for each in drawn}
    close = sorted(
        (each for each in listed if id(each) not in taken), key=lambda each: margins[id(each)]
    )
    return drawn + close[: count - len(drawn)]


def explored(
    options: argparse.Namespace, compiled: polar_fx.CompiledModel, *, tokenizer: Any
) -> list[tuple[Question, Explored]]:
    """Questions and programs: of the records, or of a search made here."""
    if options.records:
        records = list(RecordReader(options.records))
        return chosen([(r.question, e) for r in records for e in r.explored], options.pairs)
    rows = generate(options.task, options.questions, split="train")
    encoded = get_template("few-shot", options.task).encode_all(tokenizer, rows)
    # the likelihood leads to right answers and near ones: where verdicts are close
    config = SearchConfig(simulations=options.simulations, reward="likelihood", length_penalty=0.0)
    asked = list(zip(rows, encoded, strict=True))
    found = run_searches(asked, TeacherForcing(compiled), compiled.depth, config)
    return [(r.question, e) for r in found for e in r.explored]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="multiplication")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--simulations", type=int, default=40)
    parser.add_argument(
        "--records",
        type=Path,
        help="of a search with few-shot prompts of built-in tasks, in this dtype",
    )
    parser.add_argument("--pairs", type=int, default=600, help="taken from the records")
    parser.add_argument(
        "--generated", type=int, default=96, help="pairs that are generated as well"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = polar_fx.load(None, getattr(torch, options.dtype))
    compiled = polar_fx.compile(model, max_length=255 if options.records else 127)
    listed = explored(options, compiled, tokenizer=tokenizer)
    questions = {q.id: q for q, _ in listed}
    templates: dict[str, Any] = templates_of("few-shot", list(questions.values()))
    of = {e.id: e for e in encode(tokenizer, list(questions.values()), templates=templates)}
    pairs = [(of[q.id], e.program) for q, e in listed]
    first = labels(e.verdict for _, e in listed)
    alone = judge(TeacherForcing(compiled, deterministic=True), pairs, seed=1, size=64)
    again = judge(TeacherForcing(compiled, deterministic=True), pairs, seed=2, size=7)
    batched = judge(TeacherForcing(compiled), pairs, seed=3, size=64)
    sample = random.Random(0).sample(range(len(pairs)), min(options.generated, len(pairs)))
    asked = [(listed[i][0].task, pairs[i]) for i in sample]
    generated = by_generation(model, tokenizer, templates=templates, asked=asked)
    right = labels(alone)
    right_of_sample = [right[i] for i in sample]
    first_of_sample = [first[i] for i in sample]
    report = {
        "benchmark": "label flips",
        "dtype": options.dtype,
        "machine": machine(torch.device("cpu")),
        "tasks": list(templates),
        "questions": len(questions),
        "pairs": len(pairs),
        "deterministic, asked again in another order": {
            **flips(right, labels(again)),
            "same_bits": sum(a == b for a, b in zip(alone, again, strict=True)),
        },
        "batched, asked again in other batches": flips(first, labels(batched)),
        "batched against deterministic": flips(first, right),
        "deterministic against HF generate": flips(right_of_sample, generated),
        "batched against HF generate": flips(first_of_sample, generated),
    }
    name = f"label-flips{'-records' if options.records else ''}-cpu-{options.dtype}.json"
    write_json(options.output or RESULTS / name, report)
    for name, found in report.items():
        if isinstance(found, dict) and "flips" in found:
            print(f"{name}: {found}")


if __name__ == "__main__":
    main()
