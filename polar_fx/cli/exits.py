"""Learn after how many layers questions with choices may be answered, and test it on others.

Where the first layers are sure enough to choose what the whole model would, the others do not run.
The choices of the whole model teach that, on one half of the train and validation questions; the
other half bounds what may change and be lost, and a task whose exit cannot be told from chance has
none. Answers only bound that loss, and those of the test questions are looked at once, in the end.
Questions are for train, validation or test by what their lines say, else by their ids.

Examples:
  python -m polar_fx exits --data questions.jsonl --out exits
  python -m polar_fx exits --data questions.jsonl --prompt choices-norm --budget 0.8 --out exits
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_model_arguments
from .verbosity import status

if TYPE_CHECKING:
    from ..jobs.exits import ExitsResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with question, choices, answer and, if they have one, task and split",
    )
    parser.add_argument(
        "--prompt",
        choices=("choices", "choices-norm"),
        default="choices",
        help="compare log-likelihoods as they are, or a character (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="mean steps to come down to, of the model's layers; more run where the risk or the "
        "loss would be too large (default: %(default)s)",
    )
    parser.add_argument(
        "--risk",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of all questions, whose choice may change; where the budget would change more, fewer "
        "leave (default: %(default)s)",
    )
    parser.add_argument(
        "--loss",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="of all questions, whose right answer may go, less those gained; where more would, "
        "fewer leave (default: %(default)s)",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=0.05,
        metavar="P",
        help="how likely risk or loss may be larger all the same (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="exits, scores and results"
    )
    add_model_arguments(parser, backend="auto")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Learn and test; prints a line a task."""
    from ..jobs.exits import ExitsJob, run
    from ..jobs.questions import Asked
    from .questions import workplace_of

    job = ExitsJob(
        out=options.out,
        asked=Asked(data=tuple(options.data), prompt=options.prompt),
        budget=options.budget,
        risk=options.risk,
        loss=options.loss,
        delta=options.delta,
        workplace=workplace_of(options),
    )
    result = run(job, status())
    if not options.json:
        print("\n".join(told(result)))
        print(f"all numbers: {options.out / 'results.json'}; the exits: {result.path}")
    return result.to_dict()


def told(result: "ExitsResult") -> list[str]:
    """A line for each task, and for all of them."""
    from ..jobs.exits import ARM

    exits = result.exits.tasks
    lines = [f"{task}: {rule.refused}" for task, rule in exits.items() if rule.refused]
    for row in result.compared:
        paired = row.paired
        if row.arm.name != ARM or paired.step_ratio is None:
            continue
        rule, gain = exits.get(row.arm.task), paired.gain
        if rule is not None and rule.refused:
            continue
        after = "" if rule is None else f" after {rule.num_steps} layers"
        lines.append(
            f"{row.arm.task}, n = {paired.n}: {100 * (paired.identity.value or 0):.1f} % right by "
            f"the whole model, {gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] points with "
            f"exits{after}, at {100 * paired.step_ratio.value:.1f} % of the steps"
        )
    if not result.compared:
        lines.append("no question is for the test; name the split of some lines to test the exits")
    return lines
