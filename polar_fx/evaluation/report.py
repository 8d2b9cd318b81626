"""What an evaluation writes: one JSON with every number, a Markdown and a CSV table, figures."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..output.files import replace_file
from ..questions.question import Question
from ..search.records.records import SearchRecord
from ..stats.arms import SEEN, UNSEEN, ArmResult, compare_arms, pool, pooled_names
from ..stats.calibration import Reliability, brier, ece, log_loss, reliability
from ..stats.paired import compare
from ..stats.tables import write_compared
from .choices import Choice


def calibration_report(chances: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Of probabilities f64[N, K] against outcomes bool[N, K]: calibration error, Brier score, log
    loss, and the bins.
    """
    return {
        "ece": ece(chances, right),
        "brier": brier(chances, right),
        "log_loss": log_loss(chances, right),
        "bins": reliability(chances, right).to_dict(),
    }


def distributions(
    questions: Sequence[Question], trained_on: Collection[str]
) -> dict[str, list[int]]:
    """The places of questions of tasks the predictor was trained on, and of others; without what
    there is none of.
    """
    found: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        found.setdefault(SEEN if question.task in trained_on else UNSEEN, []).append(place)
    return found


def selector_report(
    choices: Sequence[Choice],
    records: Sequence[SearchRecord],
    *,
    chances: np.ndarray,
    right: np.ndarray,
) -> dict[str, Any]:
    """What single-shot methods, the selector's first, do on these questions: programs it uses,
    calibration, difficulty.

    `chances` f64[N, K] are its probabilities, `right` bool[N, K] what came true.
    """
    counts = Counter(program for (program,) in choices[0].programs)
    programs_used = [
        {"program": str(p), "steps": p.num_steps, "share": c / len(records)}
        for p, c in counts.most_common()
    ]
    return {
        "questions": len(records),
        "calibration": calibration_report(chances, right),
        "programs_used": programs_used,
        "difficulty": [row for choice in choices for row in by_difficulty(choice, records)],
    }


def by_difficulty(choice: Choice, records: Sequence[SearchRecord]) -> list[dict[str, Any]]:
    """A single-shot method's accuracy, the identity's, and mean steps a difficulty level, over all
    tasks.
    """
    programs = [program for (program,) in choice.programs]
    right = np.array([r.verdicts[p].correct for r, p in zip(records, programs, strict=True)])
    steps = np.array([float(p.num_steps) for p in programs])
    levels = np.array([r.question.difficulty or 0 for r in records])
    identity = np.array([r.baseline.correct for r in records])
    found = []
    for level in sorted({int(v) for v in levels}):
        of = levels == level
        found.append(
            {
                "arm": choice.name,
                "difficulty": level or None,
                "n": int(of.sum()),
                "identity": float(identity[of].mean()),
                "accuracy": float(right[of].mean()),
                "steps": float(steps[of].mean()),
            }
        )
    return found


def against(arms: Sequence[ArmResult], method: str, *, other: str) -> list[dict[str, Any]]:
    """One method beside another instead of the identity, by task and over all."""
    ours = [arm for arm in arms if arm.name == method]
    theirs = [arm for arm in arms if arm.name == other]
    pairs: list[tuple[ArmResult, ArmResult]] = []
    for label, tasks in pooled_names(ours).items():
        pairs.append((_pooled(ours, tasks, label=label), _pooled(theirs, tasks, label=label)))
    pairs += zip(ours, theirs, strict=True)
    return [
        {
            "arm": method,  # `method` and `identity` are shares, of `to_dict`
            "against": other,
            "task": one.task,
            **compare(
                one.right, two.right, steps=one.steps, identity_steps=two.steps, strata=one.strata
            ).to_dict(),
        }
        for one, two in pairs
    ]


def _pooled(arms: Sequence[ArmResult], tasks: Collection[str], *, label: str) -> ArmResult:
    return pool([arm for arm in arms if arm.task in tasks], label)


def write_report(
    folder: Path,
    arms: Sequence[ArmResult],
    *,
    results: Mapping[str, Any],
    diagrams: Mapping[str, Reliability],
    figures: bool = True,
) -> list[Path]:
    """Write `results.json`, `arms.md`, `arms.csv` and figures; returns the paths. Raises OSError.

    Every arm of `results.json` has its comparison with the identity; per-question outcomes stay in
    the record files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = compare_arms(arms)
    compared = [
        {
            "arm": row.label,
            "task": row.arm.task,
            "out_of_distribution": row.arm.unseen,
            "oracle": row.arm.oracle,
            "adjusted_p": row.adjusted_p,
            **row.paired.to_dict(),
            **_means(row.arm),
        }
        for row in rows
    ]
    path = folder / "results.json"
    text = json.dumps({**results, "arms": compared}, indent=1, default=_as_json)
    replace_file(path, [text.encode() + b"\n"])
    written = [path, *write_compared(rows, folder)]
    if figures:
        from ..stats.figures import draw_compared

        written += draw_compared(rows, folder, reliability=dict(diagrams))
    return written


def _means(arm: ArmResult) -> dict[str, float | None]:
    names = ("unique_layers", "format_valid", "generated_tokens")
    return {
        name: None if getattr(arm, name) is None else float(np.mean(getattr(arm, name)))
        for name in names
    }


def _as_json(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
