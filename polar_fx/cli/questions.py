"""Options of the commands that are jobs: the questions, and where they are judged."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jobs.questions import Asked
from .options import add_model_arguments, whole

if TYPE_CHECKING:
    from ..search.workers import Workplace


def add_question_arguments(parser: argparse.ArgumentParser, default: str | None) -> Any:
    """--task, --data, --questions, --prompt, --seed; `default` says how many questions there
    are, None that the command decides it, without an option.
    """
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--task", action="append", metavar="NAME", help="built-in task; may be given several times"
    )
    asked.add_argument(
        "--data",
        action="append",
        type=Path,
        metavar="FILE",
        help="JSON lines with question, answer and, if there are any, choices and split",
    )
    if default is None:
        parser.set_defaults(questions=None)
    else:
        asked.add_argument(
            "--questions",
            type=whole(1),
            metavar="N",
            help=f"of all tasks together (default: {default})",
        )
    asked.add_argument(
        "--prompt",
        default=None,
        help="few-shot, direct, plain, choices or choices-norm (default: few-shot; with --data "
        "direct, or choices where there are any)",
    )
    parser.add_argument("--seed", type=int, default=0)
    return asked


def asked_of(options: argparse.Namespace) -> Asked:
    """The questions that these options, --seed and, where a command has it, --split name."""
    return Asked(
        tasks=tuple(options.task or ()),
        data=tuple(options.data or ()),
        count=options.questions,
        prompt=options.prompt,
        split=getattr(options, "split", None),
        seed=options.seed,
    )


def add_running_arguments(parser: argparse.ArgumentParser, workers: str) -> Any:
    """--workers, which are processes that do what `workers` says, and which model they run."""
    run = parser.add_argument_group("running")
    run.add_argument(
        "--workers",
        type=whole(1),
        default=1,
        metavar="N",
        help=f"processes that {workers} (default: %(default)s)",
    )
    add_model_arguments(parser, backend="auto")
    return run


def job_settings(options: argparse.Namespace, **judging: Any) -> dict[str, Any]:
    """What every job takes: questions, where results go, where and by how many it is judged;
    `judging` are further settings of the workplace.
    """
    return {
        "asked": asked_of(options),
        "out": options.out,
        "workplace": workplace_of(options, **judging),
        "workers": options.workers,
    }


def workplace_of(options: argparse.Namespace, **judging: Any) -> "Workplace":
    """What `add_model_arguments` declares, and how it is judged there."""
    from ..search.workers import Workplace

    return Workplace(
        model=options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        backend=options.backend,
        device=options.device,
        **judging,
    )
