"""Accuracy of the identity and of programs that leave out a little, on tasks with choices.

Reads JSON lines with choices (`docs/search.md`), judges every question by each program, as
lm-evaluation-harness' acc and acc_norm do, and prints a table with intervals: Wilson's of an
accuracy, and of a difference from the identity the paired bootstrap's. Nothing is chosen by it.
"""

import argparse
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import polar_fx
from measure import machine, write_json
from polar_fx.jobs.questions import row_tokens, templates_of
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.judge.verdict import choice_verdict
from polar_fx.program import Program
from polar_fx.questions import Question, choice_template, load_jsonl
from polar_fx.stats.intervals import wilson
from polar_fx.stats.paired import compare

_PART = 32  # questions judged at a time


def main() -> None:
    """Parse the command line, judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--program", action="append", default=[])
    parser.add_argument("--questions", type=int, help="of each file (default: all)")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    questions = [q for path in options.data for q in load_jsonl(path)[: options.questions]]
    model, tokenizer = polar_fx.load(options.model, options.dtype)
    templates = templates_of("choices", questions)
    by_task: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_task[question.task].append(question)
    encoded = {
        task: templates[task].encode_all(tokenizer, asked) for task, asked in by_task.items()
    }
    length = row_tokens(
        list(chain.from_iterable(encoded.values())),
        list(chain.from_iterable(by_task.values())),
        templates=templates,
        limit=None,
        generated=False,
    )
    compiled = polar_fx.compile(model, options.backend, max_length=length)
    programs = [Program.identity(compiled.depth), *map(compiled.resolve, options.program)]
    forcing, began = TeacherForcing(compiled), time.perf_counter()
    rows = []
    for task, asked in by_task.items():
        right = judge(forcing, encoded[task], asked=asked, programs=programs)
        rows += [
            row_of(task, str(p), steps=p.num_steps, right=right, k=k)
            for k, p in enumerate(programs)
        ]
        for row in rows[-len(programs) :]:
            print(told(row), flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(questions) * len(programs) / seconds:.1f} verdicts a second")
    if options.out is not None:
        facts = {"machine": machine(compiled.device), "seconds": seconds}
        write_json(options.out, {**facts, "data": [p.name for p in options.data], "rows": rows})


def judge(
    forcing: TeacherForcing, encoded: Any, *, asked: list[Question], programs: list[Program]
) -> dict[str, list[list[bool]]]:
    """Whether each program [K] is right on each question [N], by metric."""
    right: dict[str, list[list[bool]]] = {"acc": [], "acc_norm": []}
    for flags in right.values():
        flags += ([] for _ in programs)
    for start in range(0, len(encoded), _PART):
        part = encoded[start : start + _PART]
        scores = forcing.choice_scores([(e, p) for e in part for p in programs])
        for i, (each, question) in enumerate(zip(part, asked[start : start + _PART], strict=True)):
            lengths = lengths_of(question)
            for k in range(len(programs)):
                of_program = scores[i * len(programs) + k]
                by_length = [s / n for s, n in zip(of_program, lengths, strict=True)]
                key = each.choice.right
                right["acc"][k].append(choice_verdict(of_program, key).correct)
                right["acc_norm"][k].append(choice_verdict(by_length, key).correct)
        forcing.forget([e.id for e in part])
    return right


def lengths_of(question: Question) -> list[float]:
    """What acc_norm divides by; after a blank all continuations are one text."""
    blank = choice_template("choices", question.task).blank
    return [1.0 if blank else float(len(choice)) for choice in question.choices]


def row_of(
    task: str, program: str, *, steps: int, right: dict[str, list[list[bool]]], k: int
) -> dict[str, Any]:
    """A program on a task, beside the identity, in per cent and points."""
    found: dict[str, Any] = {"task": task, "program": program, "steps": steps}
    for metric, of_programs in right.items():
        flags, identity = of_programs[k], of_programs[0]
        low, high = wilson(sum(flags), len(flags))
        share = sum(flags) / len(flags)
        gain = compare(flags, identity).gain
        found[metric] = {
            "n": len(flags),
            "accuracy": [100 * x for x in (share, low, high)],
            "gain": [gain.value, gain.low, gain.high],
        }
    return found


def told(row: dict[str, Any]) -> str:
    """A line of the table."""
    parts = [f"{row['task']}, {row['program']}, {row['steps']} steps"]
    for metric in ("acc", "acc_norm"):
        value, low, high = row[metric]["accuracy"]
        gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row[metric]["gain"])
        parts.append(f"{metric} {value:.1f} % [{low:.1f}, {high:.1f}] {gain}")
    return "; ".join(parts) + f"; n = {row['acc']['n']}"


if __name__ == "__main__":
    main()
