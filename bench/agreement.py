"""Several short programs that agree, at no more steps than one whole pass: is their answer better?

Reads JSON lines with choices (`docs/search.md`), of each task train and validation questions. Every
program of a pool (the first layers, and a few of the last) scores the choices of the train
questions; of all sets of so many programs whose shared and own steps fit the budget, the one whose
summed log-shares are right most often is chosen, and beside it the best single program of as many
steps. The validation questions are asked once, by the chosen ones and the identity. Steps that
programs begin with in common count once, as a trie runs them.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

import polar_fx
from measure import machine, write_json
from polar_fx.judge.choosing import choice_scores
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, any_template, load_jsonl
from polar_fx.stats.intervals import wilson
from polar_fx.stats.paired import compare

_PART = 32  # questions judged at a time


def main() -> None:
    """Parse the command line, choose, test, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds TASK_train.jsonl, TASK_validation.jsonl")
    parser.add_argument("tasks", nargs="+", help="TASK, or TASK:norm to compare by characters")
    parser.add_argument("--questions", type=int, default=150, help="train questions of a task")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = polar_fx.load(options.model, options.dtype)
    compiled = polar_fx.compile(model, "eager", max_length=511)
    forcing, rows = TeacherForcing(compiled), []
    for text in options.tasks:
        task, _, norm = text.partition(":")
        template = any_template("choices-norm" if norm else "choices", task)
        asked = {}
        for split, count in (("train", options.questions), ("validation", None)):
            questions = load_jsonl(options.folder / f"{task}_{split}.jsonl")[:count]
            asked[split] = template.encode_all(tokenizer, questions)
        rows += study(forcing, text, asked=asked)
    if options.out is not None:
        write_json(options.out, {"machine": machine(compiled.device), "rows": rows})


def study(
    forcing: TeacherForcing, task: str, *, asked: dict[str, list[EncodedQuestion]]
) -> list[dict[str, Any]]:
    """Sets of one, two and three programs chosen by train questions, on validation."""
    depth = forcing.compiled.depth
    pool = programs_of(depth)
    train = log_shares(forcing, asked["train"], programs=pool)
    identity = Program.identity(depth)
    rows, chosen = [], {}
    for budget in (1.0, 0.9):
        for size in (1, 2, 3):
            sets = combinations(range(len(pool)), size)
            fit = [s for s in sets if trie_size(at(pool, s)) <= budget * depth]
            shares = [right(train, s, asked=asked["train"]).mean() for s in fit]
            chosen[budget, size] = at(pool, fit[int(np.argmax(shares))])
    used = list({p: None for programs in chosen.values() for p in programs})
    found = log_shares(forcing, asked["validation"], programs=[*used, identity])
    whole = right(found, [len(used)], asked=asked["validation"])
    told = [float(whole.mean()), *wilson(int(whole.sum()), len(whole))]
    for (budget, _), programs in chosen.items():
        places = [used.index(p) for p in programs]
        flags = right(found, places, asked=asked["validation"])
        gain = compare(flags.tolist(), whole.tolist()).gain
        rows.append(
            {
                "task": task,
                "n": len(flags),
                "programs": list(map(str, programs)),
                "budget": budget,
                "steps": trie_size(programs),
                "identity": told,
                "gain": [gain.value, gain.low, gain.high],
            }
        )
        print("{task}: {programs}, {steps} steps, n = {n}, {gain}".format(**rows[-1]), flush=True)
    return rows


def programs_of(depth: int) -> list[Program]:
    """The first a layers and the last b, of a third of the depth to nearly all of it."""
    firsts = sorted({round(depth * share / 30) for share in (6, 10, 14, 18, 20, 22, 24, 26, 28)})
    return [
        Program.from_path([*range(a), *range(depth - b, depth)], depth)
        for a in firsts
        for b in (0, 2, 4)
        if a + b < depth
    ]


def at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """The values at these places."""
    return [values[i] for i in places]


def trie_size(programs: Sequence[Program]) -> int:
    """Steps that run if what programs begin with in common runs once."""
    return len({p.path[: k + 1] for p in programs for k in range(len(p.path))})


def log_shares(
    forcing: TeacherForcing, asked: list[EncodedQuestion], *, programs: Sequence[Program]
) -> list[list[np.ndarray]]:
    """Of each program and question: logarithms of the choices' shares, [choices]."""
    found: list[list[np.ndarray]] = [[] for _ in programs]
    for start in range(0, len(asked), _PART):
        part = asked[start : start + _PART]
        for of_program, program in zip(found, programs, strict=True):
            for each in choice_scores(forcing, part, program=program):
                scores = np.array(each.scores)
                of_program.append(scores - np.logaddexp.reduce(scores))
        forcing.forget([e.id for e in part])
    return found


def right(
    found: list[list[np.ndarray]], places: Sequence[int], *, asked: list[EncodedQuestion]
) -> np.ndarray:
    """Whether the highest sum of the programs' log-shares is the key, bool[N]."""
    keys = [each.require_choice().right for each in asked]
    chosen = [int(np.argmax(sum(each))) for each in zip(*at(found, places), strict=True)]
    return np.array(chosen) == np.array(keys)


if __name__ == "__main__":
    main()
