"""Search programs that answer questions: offline labels for a predictor, every explored program
kept.

Goes on where a run of the same settings ended; Ctrl-C loses only the questions being searched.

Examples:
  python -m polar_fx search --task multiplication --questions 200 --out run.jsonl
  python -m polar_fx search --task addition --task sequences --questions 400 --workers 2 \\
      --out run.jsonl
  python -m polar_fx search --data questions.jsonl --prompt direct --judge generation \\
      --out run.jsonl
  python -m polar_fx analyze run.jsonl
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .messages import next_command
from .options import whole
from .questions import add_question_arguments, add_running_arguments, job_settings
from .verbosity import status

if TYPE_CHECKING:
    from ..search.config import SearchConfig

_CONVERT: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda v: {"true": True, "false": False}[v.lower()],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    asked = add_question_arguments(parser, "100; all of --data")
    asked.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="of the built-in tasks (default: train)",
    )
    _add_search_arguments(parser.add_argument_group("search"))
    _add_judging_arguments(add_running_arguments(parser, "search"))


def _add_search_arguments(how: Any) -> None:
    """Where records go, and what is searched."""
    how.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="search records, JSON lines"
    )
    how.add_argument(
        "--restart", action="store_true", help="begin anew; the old file stays as FILE.old"
    )
    how.add_argument(
        "--method",
        default="mcts",
        help="mcts, scan, random, beam or evolution (default: %(default)s)",
    )
    how.add_argument(
        "--simulations",
        type=whole(1),
        default=200,
        metavar="N",
        help="beside the identity (default: %(default)s)",
    )
    how.add_argument(
        "--reward", default="exact", help="exact, likelihood or margin (default: %(default)s)"
    )
    how.add_argument(
        "--nested", action="store_true", help="edit the current path instead of the identity"
    )
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of SearchConfig",
    )


def _add_judging_arguments(run: Any) -> None:
    """How programs are judged, and where beside this process."""
    run.add_argument(
        "--judge", choices=("teacher-forcing", "generation"), default="teacher-forcing"
    )
    run.add_argument(
        "--verify",
        action="store_true",
        help="generate and grade once more with every program found valid",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="verdicts with the same bits whatever runs beside them",
    )
    run.add_argument(
        "--in-flight",
        type=whole(1),
        default=32,
        metavar="N",
        help="questions searched at a time by each worker",
    )
    run.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="workers on a Ray cluster; none: on this machine",
    )


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Search every question that has no record yet; returns and prints counts."""
    from ..jobs.search import SearchJob, run

    judging = {
        "deterministic": options.deterministic,
        "evaluator": options.judge,
        "verify": options.verify,
        "in_flight": options.in_flight,
    }
    job = SearchJob(
        config=_config(options),
        **job_settings(options, **judging),
        ray=options.ray,
        restart=options.restart,
    )
    result = run(job, status())
    if not options.json:
        counts = result.counts
        print(
            f"{result.searched} questions searched in {result.seconds:.0f} s, "
            f"{result.evaluations_per_second:.1f} evaluations/s: {counts.right} right as "
            f"they are, {counts.corrected} corrected, {counts.shorter} with a shorter "
            f"program\n{next_command('analyze', options.out, options=options)}"
        )
    return result.to_dict()


def _config(options: argparse.Namespace) -> "SearchConfig":
    from ..search.config import SearchConfig

    kinds = {f.name: getattr(f.type, "__name__", f.type) for f in fields(SearchConfig)}
    values: dict[str, Any] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds:
            raise InputError(
                f"--set {text!r} is no setting; write NAME=VALUE with one of {', '.join(kinds)}"
            )
        try:
            values[name] = _CONVERT[str(kinds[name])](value)
        except (ValueError, KeyError):
            raise InputError(f"--set {text!r}: {value!r} is not of type {kinds[name]}") from None
    return SearchConfig.from_dict(
        {
            "method": options.method,
            "simulations": options.simulations,
            "reward": options.reward,
            "seed": options.seed,
            "nested": options.nested,
            **values,
        }
    )
