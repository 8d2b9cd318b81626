"""Train a predictor from search records: mine a menu, run it on train questions, fit and calibrate
a selector.

Goes on where an interrupted run of the same settings ended. Test questions are never looked at.

Examples:
  python -m polar_fx train run.jsonl --questions 1500 --out predictor
  python -m polar_fx train --program programs.txt --task addition --out predictor
  python -m polar_fx train run.jsonl --task multiplication --menu 16 --after-steps 6 --out predictor
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .messages import next_command
from .options import program_texts, whole
from .questions import add_question_arguments, add_running_arguments, job_settings
from .verbosity import status

if TYPE_CHECKING:
    from ..training.pipeline import TrainingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "records", nargs="*", type=Path, metavar="FILE", help="search records, of `search`"
    )
    asked = add_question_arguments(parser, "1500; of --data all")
    asked.add_argument(
        "--validation-questions",
        type=whole(1),
        metavar="N",
        help="(default: a quarter of --questions)",
    )
    _add_predictor_arguments(parser.add_argument_group("predictor"))
    _add_menu_arguments(parser.add_argument_group("menu"))
    _add_learning_arguments(parser.add_argument_group("training"))
    add_running_arguments(parser, "label")


def _add_predictor_arguments(what: Any) -> None:
    """What is written, and how it will choose."""
    what.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the predictor, and what it was made of",
    )
    what.add_argument(
        "--after-steps", type=whole(0), default=4, metavar="N", help="steps that all programs share"
    )
    what.add_argument(
        "--window", type=whole(1), default=16, metavar="N", help="last prompt tokens looked at"
    )
    what.add_argument(
        "--budget",
        action="append",
        type=float,
        metavar="F",
        help="fraction of steps to set a price for",
    )
    what.add_argument(
        "--risk",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="accuracy that leaving the identity may lose",
    )
    what.add_argument(
        "--policy", default="accuracy", help="saved with the predictor (default: %(default)s)"
    )


def _add_menu_arguments(menu: Any) -> None:
    """Which programs there will be to choose from, and what is run to find them."""
    menu.add_argument(
        "--menu",
        type=whole(2),
        default=32,
        metavar="K",
        help="programs to choose from (default: %(default)s)",
    )
    menu.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="to choose from, beside the identity: text, or a file with one a line; then nothing "
        "is mined and no records are needed",
    )
    menu.add_argument(
        "--candidates",
        type=whole(0),
        default=96,
        metavar="N",
        help="programs of the records that are screened",
    )
    menu.add_argument(
        "--edits",
        type=whole(0),
        default=128,
        metavar="N",
        help="single edits that are screened as well",
    )
    menu.add_argument(
        "--variations", type=whole(0), default=64, metavar="N", help="new ones made of the best"
    )
    menu.add_argument(
        "--screen-questions",
        type=whole(1),
        default=250,
        metavar="N",
        help="to screen all of them on",
    )
    menu.add_argument(
        "--finalists", type=whole(1), default=64, metavar="N", help="the best of them"
    )
    menu.add_argument(
        "--final-questions",
        type=whole(0),
        default=750,
        metavar="N",
        help="to try those on, out of the rest",
    )


def _add_learning_arguments(learn: Any) -> None:
    """The network and its training."""
    learn.add_argument(
        "--width",
        type=whole(0),
        default=64,
        help="of the hidden layer; 0: none (default: %(default)s)",
    )
    learn.add_argument(
        "--likelihood-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of the answer's probability in labels",
    )
    learn.add_argument(
        "--networks",
        type=whole(1),
        default=4,
        metavar="N",
        help="whose mean is used (default: %(default)s)",
    )
    learn.add_argument("--epochs", type=whole(1), default=200)
    learn.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write losses there (needs tensorboard)"
    )


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Train; writes predictor and results, returns the results."""
    from ..jobs.train import TrainJob, run

    job = TrainJob(
        records=tuple(options.records),
        programs=tuple(program_texts(options.program or [])),
        validation_count=options.validation_questions,
        config=_config(options),
        policy=options.policy,
        **job_settings(options),
        tensorboard=options.tensorboard,
    )
    results = run(job, status())
    if not options.json:
        _print(results)
        words = ("evaluate", options.out, "--out", options.out.parent / "report")
        print(next_command(*words, options=options, same=("data", "prompt", "model")))
    return results


def _config(options: argparse.Namespace) -> "TrainingConfig":
    from ..predictor.features import Features
    from ..training.pipeline import TrainingConfig
    from ..training.selector_training import SelectorConfig

    selector = SelectorConfig(
        width=options.width,
        likelihood_weight=options.likelihood_weight,
        epochs=options.epochs,
        networks=options.networks,
        seed=options.seed,
    )
    return TrainingConfig(
        features=Features(options.after_steps, options.window),
        menu_size=options.menu,
        num_candidates=options.candidates,
        num_edits=options.edits,
        num_variations=options.variations,
        screen_questions=options.screen_questions,
        num_finalists=options.finalists,
        final_questions=options.final_questions,
        budgets=tuple(options.budget or TrainingConfig().budgets),
        risk=options.risk,
        selector=selector,
    )


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="on validation questions, which set the thresholds: no estimate of what others will "
        "give"
    )
    for column in ("policy", "right", "steps"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in results["validation"].items():
        steps = f"{row['steps']:.2f}" if "steps" in row else ""
        table.add_row(name, f"{100 * row['accuracy']:.1f} %", steps)
    console = Console()
    console.print(table)
    ece, loss = results["ece"], results["log_loss"]
    console.print(
        f"log loss {loss['after']:.3f} (base rates {loss['base_rates']:.3f}), calibration error "
        f"{100 * ece['after']:.1f} % (before scaling {100 * ece['before']:.1f} %)",
        highlight=False,
    )
