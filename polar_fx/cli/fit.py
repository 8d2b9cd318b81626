"""Make a predictor of one's own questions and test it: search, train and evaluate in one command.

Says first how long it will take, and last what came of it. Goes on where it was interrupted; test
questions are looked at in the last part alone. Without --task or --data, five built-in tasks are
asked.

Examples:
  python -m polar_fx fit --data questions.jsonl --out mine
  python -m polar_fx fit --task addition --preset full --workers 2 --out addition
"""

import argparse
from pathlib import Path
from typing import Any

from .messages import next_command
from .questions import add_question_arguments, add_running_arguments, asked_of, workplace_of
from .verbosity import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_question_arguments(parser, None)
    parser.add_argument(
        "--preset",
        choices=("quick", "full"),
        default="quick",
        help="how much is searched and tried (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="search records, predictor and report",
    )
    add_running_arguments(parser, "search and label")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Search, train and evaluate; prints what came of it."""
    from ..jobs.fit import FitJob, run

    job = FitJob(
        out=options.out,
        asked=asked_of(options),
        preset=options.preset,
        workplace=workplace_of(options),
        workers=options.workers,
    )
    result = run(job, status())
    if not options.json:
        print(result.conclusion)
        print(f"question by question, in a browser: {result.report / 'report.html'}")
        # as the predictor saw questions: the direct prompt alone is a chat
        raw = (
            ()
            if (options.prompt or ("direct" if options.data else None)) == "direct"
            else ("--raw",)
        )
        run = ("run", "--predictor", result.predictor, *raw)
        print(next_command(*run, "--prompt", "...", options=options, same=("model",)))
    return result.to_dict()
