"""Compared arms as Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..output.files import made_folder, write_whole
from .arms import IDENTITY, UNSEEN, ArmComparison
from .intervals import Share
from .paired import Estimate

NOTE = (
    "Accuracies in % with Wilson's 95 % interval; gains over the identity in points with the "
    "paired bootstrap's; p of the exact McNemar test, and after Holm among the arms of a task; "
    "steps in % of the identity's. Oracles choose by the answer key: bounds, not methods, and not "
    "tested."
)
UNSEEN_NOTE = f"The predictor was not trained on tasks that are {UNSEEN}."
_HEAD = (
    "task",
    "arm",
    "n",
    "accuracy",
    "gain",
    "gained / lost",
    "McNemar p",
    "Holm p",
    "steps %",
    "unique layers",
    "format valid %",
    "tokens",
)
_NONE = "–"


def write_compared(
    rows: Sequence[ArmComparison], folder: str | Path, *, stem: str = "arms"
) -> list[Path]:
    """Write what `compare_arms` returned as `<stem>.md` and `<stem>.csv` into a folder, which is
    made; returns both.

    Raises InputError.
    """
    folder = made_folder(folder)
    texts = {"md": markdown(rows), "csv": csv_text(rows)}
    return [
        write_whole(text.encode(), folder / f"{stem}.{ending}") for ending, text in texts.items()
    ]


def markdown(rows: Sequence[ArmComparison], note: str = NOTE) -> str:
    """One table, a line for each arm and task in the order given, with what its columns mean below
    it.
    """
    if note and any(row.arm.unseen for row in rows):
        note = f"{note} {UNSEEN_NOTE}"
    head = [*_HEAD]
    table = "\n".join(markdown_lines(head, map(_cells, rows), right=len(head) - 2))
    return f"{table}\n\n{note}\n" if note else f"{table}\n"


def markdown_lines(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0
) -> list[str]:
    """A table of cells as they are; the last `right` columns are aligned to the right."""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _cells(row: ArmComparison) -> list[str]:
    arm, paired = row.arm, row.paired
    compared = arm.name != IDENTITY
    tested = compared and not arm.oracle
    return [
        _escape(row.task_label),
        _escape(row.label),
        f"{paired.n:,}",
        _interval(_accuracy(paired.method), ".1f"),
        _interval(paired.gain, "+.1f") if compared else _NONE,
        f"{paired.gained} / {paired.lost}" if compared else _NONE,
        _p(paired.p_value if tested else None),
        _p(row.adjusted_p),
        _NONE if paired.step_ratio is None else _interval(_scaled(paired.step_ratio), ".1f"),
        _mean(arm.unique_layers, ".1f"),
        _mean(arm.format_valid, ".1f", times=100),
        _mean(arm.generated_tokens, ".1f"),
    ]


def _accuracy(share: Share) -> Estimate:
    found = share.to_dict()
    return _scaled(Estimate(found["share"], found["low"], found["high"]))


def _scaled(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _interval(estimate: Estimate, form: str) -> str:
    return (
        f"{_number(estimate.value, form)} [{_number(estimate.low, form)}, "
        f"{_number(estimate.high, form)}]"
    )


def _number(value: float, form: str) -> str:
    text = format(value, form)
    if not float(text):  # neither -0.0 nor +0.0
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _p(value: float | None) -> str:
    return _NONE if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _mean(values: np.ndarray | None, form: str, *, times: float = 1) -> str:
    return _NONE if values is None else format(times * float(values.mean()), form)


def _escape(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


_COLUMNS: dict[str, Callable[[ArmComparison], Any]] = {
    "task": lambda row: row.arm.task,
    "arm": lambda row: row.arm.name,
    "oracle": lambda row: int(row.arm.oracle),
    "out_of_distribution": lambda row: int(row.arm.unseen),
    "n": lambda row: row.paired.n,
    "accuracy": lambda row: row.paired.method.value,
    "accuracy_low": lambda row: row.paired.method.to_dict()["low"],
    "accuracy_high": lambda row: row.paired.method.to_dict()["high"],
    "identity_accuracy": lambda row: row.paired.identity.value,
    "gain_points": lambda row: row.paired.gain.value,
    "gain_low": lambda row: row.paired.gain.low,
    "gain_high": lambda row: row.paired.gain.high,
    "gain_score_low": lambda row: row.paired.score.low,
    "gain_score_high": lambda row: row.paired.score.high,
    "gained": lambda row: row.paired.gained,
    "lost": lambda row: row.paired.lost,
    "mcnemar_p": lambda row: row.paired.p_value,
    "holm_p": lambda row: row.adjusted_p,
    "steps": lambda row: _part(row.paired.steps, "value"),
    "steps_low": lambda row: _part(row.paired.steps, "low"),
    "steps_high": lambda row: _part(row.paired.steps, "high"),
    "step_ratio": lambda row: _part(row.paired.step_ratio, "value"),
    "step_ratio_low": lambda row: _part(row.paired.step_ratio, "low"),
    "step_ratio_high": lambda row: _part(row.paired.step_ratio, "high"),
    "unique_layers": lambda row: _plain_mean(row.arm.unique_layers),
    "format_valid": lambda row: _plain_mean(row.arm.format_valid),
    "generated_tokens": lambda row: _plain_mean(row.arm.generated_tokens),
}


def _part(estimate: Estimate | None, name: str) -> float | None:
    return None if estimate is None else getattr(estimate, name)


def _plain_mean(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values.mean())


def csv_text(rows: Iterable[ArmComparison]) -> str:
    """The same and more as CSV, in full precision: shares and ratios 0 to 1, gains in points,
    nothing where there is none.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        writer.writerow(
            ["" if (value := read(row)) is None else value for read in _COLUMNS.values()]
        )
    return out.getvalue()
