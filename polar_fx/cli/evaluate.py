"""Compare a predictor with the identity and with baselines on test questions, each question paired
with itself.

The identity runs in the same job; the answer key is seen by the grader alone. Methods that need it
to choose are marked oracles. Goes on where an interrupted run of the same settings ended.

Examples:
  python -m polar_fx evaluate predictor --questions 2000 --out report
  python -m polar_fx evaluate predictor --records run.jsonl --answers 0 --out report
"""

import argparse
import time
from pathlib import Path
from typing import Any

from .options import weights_as_trained, whole
from .questions import add_question_arguments, add_running_arguments, job_settings
from .verbosity import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("predictor", type=Path, metavar="FOLDER", help="of `train`")
    add_question_arguments(parser, "2000; of --data all")
    what = parser.add_argument_group("comparison")
    what.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="tables, figures, results, verdicts, and a page to look at them",
    )
    what.add_argument(
        "--records",
        action="append",
        type=Path,
        metavar="FILE",
        help="search records, more labels for baselines",
    )
    what.add_argument(
        "--answers",
        type=whole(0),
        default=400,
        metavar="N",
        help="questions to also generate answers for",
    )
    what.add_argument(
        "--votes",
        type=whole(2),
        default=3,
        metavar="K",
        help="programs that vote (default: %(default)s)",
    )
    what.add_argument(
        "--encoder",
        metavar="FOLDER",
        help="text encoder (or its id), for PoLar's network as the paper has it",
    )
    what.add_argument(
        "--no-baselines",
        action="store_true",
        help="the predictor's own policies and static programs only",
    )
    what.add_argument("--no-figures", action="store_true", help="tables and numbers only")
    add_running_arguments(parser, "judge")
    parser.set_defaults(dtype=None)  # the predictor's own, unless it is given


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate; writes the report, returns the results."""
    began = time.perf_counter()
    from ..jobs.evaluate import EvaluateJob, run

    weights_as_trained(options)
    job = EvaluateJob(
        predictor=options.predictor,
        records=tuple(options.records or ()),
        answers=options.answers,
        votes=options.votes,
        encoder=options.encoder,
        baselines=not options.no_baselines,
        figures=not options.no_figures,
        seed=options.seed,
        **job_settings(options),
    )
    evaluation = run(job, status())
    if not options.json:
        print(evaluation.conclusion)
        seconds = time.perf_counter() - began
        print(f"{len(evaluation.files)} files in {options.out}; {seconds:.0f} s")
        print(f"all methods: {options.out / 'arms.md'}")
        print(f"question by question, in a browser: {options.out / 'report.html'}")
    return evaluation.results
