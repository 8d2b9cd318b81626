"""From nothing to tables for a model, within a budget of hours: search, menu, training, test, and
baselines, in one command.

A short measurement on this machine decides how many questions and programs fit the budget; the
plan is shown first and kept. The same command goes on where it was interrupted. By default built-in
tasks are asked; --protocol paper asks files whose lines name a tier of difficulty, for the answer
alone in a box, and compares tiers.

Examples:
  python -m polar_fx reproduce --budget 6 --out reproduction
  python -m polar_fx reproduce owner/name --device cuda --dtype bfloat16 --protocol paper \\
      --data train.jsonl --data validation.jsonl --budget 24 --out paper
"""

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError
from .checks import check_names
from .questions import add_running_arguments, workplace_of
from .verbosity import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "named", nargs="?", metavar="MODEL", help="HuggingFace id or folder, as of --model"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=6.0,
        metavar="HOURS",
        help="that all of it may take, about (default: %(default)g)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="plan, records, report, tables"
    )
    parser.add_argument(
        "--plan-only", action="store_true", help="measure, show and keep the plan, and stop"
    )
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--protocol",
        choices=("tasks", "paper"),
        default="tasks",
        help="built-in tasks, or the paper's: tiers of --data (default: %(default)s)",
    )
    asked.add_argument(
        "--data",
        action="append",
        type=Path,
        metavar="FILE",
        help="for the paper's protocol: JSON lines with question, answer, tier and split",
    )
    asked.add_argument(
        "--leave-out",
        type=Path,
        metavar="FILE",
        help="ids, one a line, that do not enter training",
    )
    asked.add_argument(
        "--encoder",
        metavar="FOLDER",
        help="text encoder (or its id), for PoLar's network as the paper has it",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_running_arguments(parser, "search and label")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Run it; prints what came of it."""
    if options.named is not None:
        if options.model is not None:
            raise InputError(
                f"two models are named, {options.named} and --model {options.model}; name one"
            )
        options.model = options.named
        check_names(options)
    from ..jobs.reproduce import ReproduceJob, plan, run

    job = ReproduceJob(
        out=options.out,
        budget=options.budget,
        protocol=options.protocol,
        data=tuple(options.data or ()),
        leave_out=options.leave_out,
        encoder=options.encoder,
        seed=options.seed,
        workplace=workplace_of(options),
        workers=options.workers,
    )
    if options.plan_only:
        made = plan(job, status())
        if not options.json:
            print("\n".join(made.lines()))
        return made.to_dict()
    result = run(job, status())
    if not options.json:
        print(result.conclusion)
        print(f"all tables: {job.out / 'tables.md'}")
        print(f"question by question, in a browser: {job.out / 'report' / 'report.html'}")
    return result.to_dict()
