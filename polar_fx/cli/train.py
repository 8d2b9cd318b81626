"""Train a predictor from search records: mine a menu, run it on train questions, fit and calibrate
a selector.

Goes on where an interrupted run of the same settings ended. Test questions are never looked at.

Examples:
  python -m polar_fx train run.jsonl --questions 1500 --out predictor
  python -m polar_fx train run.jsonl --task multiplication --menu 16 --after-steps 6 --out predictor
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import add_model_arguments, status, whole
from .questions import add_question_arguments, check_same_prompts, questions_of, templates_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..search.records.records import SearchHeader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "records", nargs="+", type=Path, metavar="FILE", help="search records, of `search`"
    )
    asked = add_question_arguments(parser, "1500; of --data all")
    asked.add_argument(
        "--validation-questions",
        type=whole(1),
        metavar="N",
        help="(default: a quarter of --questions)",
    )
    what = parser.add_argument_group("predictor")
    what.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the predictor, and what it was made of",
    )
    what.add_argument(
        "--menu",
        type=whole(2),
        default=32,
        metavar="K",
        help="programs to choose from (default: %(default)s)",
    )
    what.add_argument(
        "--candidates",
        type=whole(0),
        default=96,
        metavar="N",
        help="programs of the records that are screened",
    )
    what.add_argument(
        "--edits",
        type=whole(0),
        default=128,
        metavar="N",
        help="single edits that are screened as well",
    )
    what.add_argument(
        "--variations", type=whole(0), default=64, metavar="N", help="new ones made of the best"
    )
    what.add_argument(
        "--screen-questions",
        type=whole(1),
        default=250,
        metavar="N",
        help="to screen all of them on",
    )
    what.add_argument(
        "--finalists", type=whole(1), default=64, metavar="N", help="the best of them"
    )
    what.add_argument(
        "--final-questions",
        type=whole(0),
        default=750,
        metavar="N",
        help="to try those on, out of the rest",
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
    learn = parser.add_argument_group("training")
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
    learn.add_argument("--seed", type=int, default=0)
    learn.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write losses there (needs tensorboard)"
    )
    run = parser.add_argument_group("running")
    run.add_argument(
        "--workers",
        type=whole(1),
        default=1,
        metavar="N",
        help="processes that label (default: %(default)s)",
    )
    add_model_arguments(parser, backend="auto")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Train; writes predictor and results, returns the results."""
    from ..search.records.record_file import RecordReader

    began = time.perf_counter()
    readers = [RecordReader(path) for path in options.records]
    headers = [reader.header for reader in readers]
    _check_same_model(headers, options.records)
    records = [record for reader in readers for record in reader]
    _default_questions(options, headers[0])
    rows = _split_questions(options)
    name = options.prompt or ("direct" if options.data else "few-shot")
    everything = [*rows["train"], *rows["validation"]]
    templates = templates_of(name, everything)
    check_same_prompts(headers, options.records, templates)
    from .labelling import Labeller

    labeller = Labeller(options, templates, everything, headers[0])
    from ..output.files import replace_file
    from ..predictor.features import Features
    from ..predictor.policy import Policy
    from ..predictor.saved import save_selector
    from ..search.analysis.menu_coverage import key
    from ..training.pipeline import MINED, TrainingConfig, folder_of, train_predictor
    from ..training.selector_training import SelectorConfig

    config = TrainingConfig(
        Features(options.after_steps, options.window),
        options.menu,
        options.candidates,
        options.edits,
        options.variations,
        options.screen_questions,
        options.finalists,
        options.final_questions,
        tuple(options.budget or TrainingConfig().budgets),
        options.risk,
        selector=SelectorConfig(
            width=options.width,
            likelihood_weight=options.likelihood_weight,
            epochs=options.epochs,
            networks=options.networks,
            seed=options.seed,
        ),
    )
    policy = Policy.parse(options.policy, labeller.depth)
    train_ids = {(q.task, q.id) for q in rows["train"]}
    held_out = {(q.task, q.id) for q in rows["validation"]}
    usable = [r for r in records if key(r) not in held_out]
    if (left := len(records) - len(usable)) or not usable:
        status().print(f"{left} records are of validation questions and not used", style="dim")
    parts = folder_of(options.out)
    encoded = labeller.encoded

    def dense(name: str, part: Any, programs: Any) -> Any:
        return labeller.table(parts / f"{name}.jsonl", part, programs)

    def features_of(part: Any) -> "Tensor":
        return labeller.features(part, config.features)

    pairs = {split: [(q, encoded[q.id]) for q in rows[split]] for split in rows}
    writer = _writer(options.tensorboard)

    def note(epoch: int, losses: dict[str, float]) -> None:
        if writer is not None:
            for side, loss in losses.items():
                writer.add_scalar(f"loss/{side}", loss, epoch)

    selector, results = train_predictor(
        usable,
        pairs["train"],
        pairs["validation"],
        dense,
        features_of,
        labeller.depth,
        config,
        note,
    )
    results |= {
        "records": [str(p.name) for p in options.records],
        "train_ids": len(train_ids),
        "model": labeller.model_fingerprint,
        "prompts": {task: template.key for task, template in templates.items()},
        "seconds": time.perf_counter() - began,
        "dtype": options.dtype,
        "ok": True,
    }
    policy.check(selector.calibration, {selector.menu.programs[0]: 0.0})
    replace_file(parts / MINED, [json.dumps(sorted({r.question.id for r in usable})).encode()])
    notes = {
        "tasks": sorted(templates),
        "prompt": name,
        "prompts": results["prompts"],
        "config": asdict(config),
    }
    save_selector(selector, options.out, labeller.model_fingerprint, policy, notes)
    replace_file(
        options.out / "results.json", [json.dumps(results, indent=1, default=str).encode() + b"\n"]
    )
    if not options.json:
        _print(results, options.out)
    return results


def _check_same_model(headers: "Sequence[SearchHeader]", paths: Sequence[Path]) -> None:
    for header, path in zip(headers[1:], paths[1:], strict=True):
        if header.model != headers[0].model:
            raise InputError(
                f"{path} is of another model than {paths[0]}; train on records of one model and "
                "dtype"
            )


def _default_questions(options: argparse.Namespace, header: "SearchHeader") -> None:
    """The tasks of the records, if none are named."""
    if not options.task and not options.data:
        from ..questions import TASKS

        options.task = [task for task in header.task.get("tasks", ()) if task in TASKS]
        if not options.task:
            raise InputError(
                "the records are of no built-in task; name questions with --task or --data"
            )


def _split_questions(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Train and validation questions; of --data by `split_of` their id."""
    if options.data:
        from ..questions import split_of

        options.split = None
        every = questions_of(argparse.Namespace(**{**vars(options), "questions": None}))
        parts = {
            split: [q for q in every if split_of(q.id) == split]
            for split in ("train", "validation")
        }
        limits = {"train": options.questions, "validation": options.validation_questions}
        return {split: part[: limits[split]] for split, part in parts.items()}
    total = options.questions or 1500
    counts = {"train": total, "validation": options.validation_questions or max(1, total // 4)}
    return {
        split: questions_of(
            argparse.Namespace(
                task=options.task, data=None, questions=n, seed=options.seed, split=split
            )
        )
        for split, n in counts.items()
    }


def _writer(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "--tensorboard needs tensorboard, which is not installed; pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder))


def _print(results: dict[str, Any], out: Path) -> None:
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
        f"{100 * ece['after']:.1f} % (before scaling {100 * ece['before']:.1f} %)\npython -m "
        f"polar_fx evaluate {out}",
        highlight=False,
    )
