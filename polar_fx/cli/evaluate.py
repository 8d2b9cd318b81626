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

from ..errors import InputError
from .labelling import Labeller
from .options import add_model_arguments, status, whole
from .questions import add_question_arguments, questions_of, templates_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("predictor", type=Path, metavar="FOLDER", help="of `train`")
    add_question_arguments(parser, "2000; of --data all")
    parser.add_argument("--seed", type=int, default=0)
    what = parser.add_argument_group("comparison")
    what.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="tables, figures, results and verdicts",
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
    run = parser.add_argument_group("running")
    run.add_argument(
        "--workers",
        type=whole(1),
        default=1,
        metavar="N",
        help="processes that judge (default: %(default)s)",
    )
    add_model_arguments(parser, backend="auto")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate; writes the report, returns the results."""
    began = time.perf_counter()
    import torch

    from ..evaluation.answers import Answerer
    from ..evaluation.baselines import (
        TrainedOn,
        encoder_choices,
        learned_choices,
        pruning_choices,
        static_choices,
        training_records,
    )
    from ..evaluation.choices import (
        arm_results,
        by_policy,
        likeliest,
        oracle,
        static,
        top_k,
        wanted_programs,
    )
    from ..evaluation.polar.text_encoder import TextEncoder
    from ..evaluation.report import against, distributions, selector_report, write_report
    from ..evaluation.votes import generated_arms
    from ..predictor.policy import Policy
    from ..predictor.saved import load_selector, read_notes
    from ..program import Program
    from ..stats.calibration import reliability
    from ..training.verdict_table import VerdictTable

    if options.encoder is not None and options.no_baselines:
        raise InputError(
            "--encoder is for one of the baselines, which --no-baselines leaves out; give one of "
            "them"
        )
    notes = read_notes(options.predictor)
    encoder = None if options.encoder is None else TextEncoder.load(options.encoder)
    if not options.task and not options.data:
        options.task = list(notes["tasks"])
    options.questions = options.questions or (None if options.data else 2000)
    options.split = None if options.data else "test"
    trained_on = TrainedOn.read(options.predictor)
    every = questions_of(options)
    questions = [q for q in every if q.id not in trained_on.ids]
    if len(questions) < len(every):
        status().print(
            f"{len(every) - len(questions)} questions were seen in training and are left out",
            style="dim",
        )
    if not questions:
        raise InputError(f"all {len(every)} questions were seen in training; ask others")
    # which tasks of files have not
    ours = "direct" if options.data and notes["prompt"] == "few-shot" else notes["prompt"]
    templates = templates_of(options.prompt or ours, questions)
    also = ([] if options.no_baselines else trained_on.questions, notes["prompt"])
    labeller = Labeller(options, templates, questions, generated=options.answers > 0, also=also)
    selector, _ = load_selector(options.predictor, labeller.model_fingerprint)
    questions = labeller.with_difficulty(questions)
    rows = [(q, labeller.encoded[q.id]) for q in questions]
    known = training_records(
        trained_on, options.records or (), {q.id for q in questions}, labeller.model_fingerprint
    )
    states = labeller.states(rows, selector.features)
    chances = selector.probabilities(
        torch.stack([selector.features.pooled(each) for each in states])
    )
    n, identity = len(rows), Program.identity(labeller.depth)

    choices = [
        static("identity", identity, n),
        by_policy("selector: accuracy", selector, Policy("accuracy"), chances),
    ]
    choices.append(likeliest("selector: likeliest", selector.menu, chances))
    for budget in selector.calibration.prices:
        choices.append(
            by_policy(
                f"selector: mean steps <= {budget:g}",
                selector,
                Policy("mean_steps", budget),
                chances,
            )
        )
    choices.append(by_policy("selector: steps <= 0.9", selector, Policy("steps", 0.9), chances))
    choices.append(oracle("any program of the menu", selector.menu, n))
    choices.append(top_k("selector: pass@3", selector.menu, chances, 3))
    choices.append(top_k("selector: pass@5", selector.menu, chances, 5))
    choices += static_choices(known, selector, questions)
    baselines: dict[str, Any] = {}
    if not options.no_baselines:
        with status().status("training the baselines ..."):
            others = labeller.encode(
                [r.question for r in (*known.train, *known.validation)], notes["prompt"]
            )
            encoded = {e.id: e for e in others}
            made, baselines["block_influences"] = pruning_choices(
                labeller.compiled, others, selector, n, options.seed
            )
            more, trained = learned_choices(
                labeller.compiled, known, encoded, states, selector.features, options.seed
            )
            choices += [*made, *more]
            baselines |= trained
            if encoder is not None:
                trunk = selector.features.num_steps
                more, trained = encoder_choices(
                    encoder, known, questions, labeller.depth, trunk, options.seed
                )
                choices += more
                baselines |= trained
    records = labeller.records(
        options.out / "verdicts.jsonl", rows, wanted_programs(choices, questions)
    )
    unseen = sorted(set(templates) - set(notes["tasks"]))
    arms = arm_results(choices, records, unseen)
    table = VerdictTable.of(records, selector.menu.programs)
    answers, part = None, _part(options.answers, n, options.seed)
    if part:
        answerer = Answerer(labeller.compiled, labeller.tokenizer, templates)
        with status().status("generating answers ..."):
            answers = generated_arms(
                answerer,
                selector,
                chances[part],
                choices[1].at(part),
                [records[i] for i in part],
                [rows[i] for i in part],
                options.votes,
                options.seed,
                unseen,
            )
    parts, singles = distributions(questions, notes["tasks"]), (choices[1], choices[0], choices[2])
    results: dict[str, Any] = {
        "ok": True,
        "predictor": str(options.predictor.name),
        "model": labeller.model_fingerprint,
        "dtype": options.dtype,
        "questions": n,
        "tasks": {t: sum(q.task == t for q in questions) for t in templates},
        "trained_on": notes["tasks"],
        "out_of_distribution": unseen,
        "prompts": {task: template.key for task, template in templates.items()},
        "threshold": selector.calibration.threshold,
        "against_static": against(arms, "selector: accuracy", "best static program"),
        "distributions": {
            name: selector_report(
                [c.at(at) for c in singles], [records[i] for i in at], chances[at], table.right[at]
            )
            for name, at in parts.items()
        },
        "generated": None if answers is None else answers.to_dict(),
        "baselines": baselines,
        "seconds": time.perf_counter() - began,
    }
    diagrams = {
        f"selector, {name}": reliability(chances[at], table.right[at]) for name, at in parts.items()
    }
    written = write_report(options.out, arms, results, diagrams, not options.no_figures)
    if answers is not None:
        written += write_report(
            options.out / "answers", answers.arms, {"n": len(part)}, {}, not options.no_figures
        )
    if not options.json:
        print((options.out / "arms.md").read_text(encoding="utf-8"))
        print(f"{len(written)} files in {options.out}; {time.perf_counter() - began:.0f} s")
    return results


def _part(count: int, total: int, seed: int) -> list[int]:
    """The places of `count` rows, drawn: rows stand task by task, and within one in a rhythm of its
    cells.
    """
    import numpy as np

    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())
