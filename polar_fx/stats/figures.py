"""Pictures of compared arms and of calibration. They need matplotlib, of the extra `search`.

Colors are those of Okabe and Ito, which the color-blind tell apart, and kinds of arms differ in
their marks too. Nothing here touches pyplot or its state.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..errors import InputError
from ..output.figure_style import FORMATS, style
from ..output.files import made_folder, write_whole
from ..output.plain_text import count
from .arms import IDENTITY, ArmComparison
from .calibration import Reliability
from .intervals import wilson

INK, GRAY = "#333333", "#7F7F7F"
WORSE, BETTER = "#D55E00", "#0072B2"
_FRONT: dict[str, Any] = {"color": BETTER, "lw": 0.9, "ls": "--"}
# of a point in `pareto`, by kind
_LOOKS: dict[str, dict[str, Any]] = {
    "identity": {"color": INK, "marker": "*", "ms": 11, "zorder": 4},
    "front": {"color": BETTER, "marker": "o", "ms": 6, "zorder": 3},
    "other": {"color": GRAY, "marker": "o", "ms": 3, "zorder": 2},
    "oracle": {"color": GRAY, "marker": "s", "mfc": "white", "ms": 5, "zorder": 2},
}
_NAMES = {
    "identity": IDENTITY,
    "front": "front, without oracles",
    "other": "other arms",
    "oracle": "oracle",
}
_percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")


def draw_compared(
    rows: Sequence[ArmComparison],
    folder: str | Path,
    *,
    reliability: Mapping[str, Reliability] | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draw what `compare_arms` returned as `pareto`, `gains` and, if there is any, `reliability`
    into a folder, which is made.

    Returns the files, `<figure>.<format>`. The same rows give the same bytes, with one version of
    matplotlib. Raises InputError for unknown formats, no rows, or a folder that cannot be written.
    """
    _check(formats)
    drawings: dict[str, Callable[[], Figure]] = {
        "pareto": lambda: pareto(rows),
        "gains": lambda: gains(rows),
    }
    if reliability:
        drawings["reliability"] = lambda: reliability_diagram(reliability)
    folder = made_folder(folder)
    made = []
    for name, draw in drawings.items():
        with style():
            figure = draw()
            for format in formats:
                file = io.BytesIO()
                # no date and no version, so that files of equal content are equal
                figure.savefig(
                    file,
                    format=format,
                    metadata={"Date": None} if format == "svg" else {"Software": None},
                )
                made.append(write_whole(file.getvalue(), folder / f"{name}.{format}"))
    return made


def _check(formats: Sequence[str]) -> None:
    if unknown := [each for each in formats if each not in FORMATS]:
        raise InputError(f"unknown figure format {unknown[0]!r}; use one of {', '.join(FORMATS)}")


def pareto(rows: Sequence[ArmComparison]) -> Figure:
    """Accuracy by executed steps as a ratio to the identity's, a panel for each task and the
    overall, a point an arm.

    The line joins the arms that no other beats in both, oracles aside: these alone are named and
    have bars, 95 % intervals (Wilson's for accuracy, the bootstrap's for steps), as the identity
    has. Oracles are hollow; those that run many times the steps of any method stand at the right
    edge with their ratio. Raises InputError without rows or steps.
    """
    panels = _panels(rows)
    columns, lines = _grid(len(panels), 3)
    figure = Figure(figsize=(3.3 * columns + 1.6, 3.0 * lines + 0.3))
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (task, group) in zip(axes.flat, panels.items(), strict=False):
        _draw_pareto(axis, group)
        axis.set_title(f"{task}, n = {_questions(group)}")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    there = {_kind(row, front=()) for row in rows} | {"front"}  # which each panel has
    handles = [
        Line2D([], [], ls="", label=_NAMES[kind], **look)
        for kind, look in _LOOKS.items()
        if kind in there
    ]
    figure.legend(handles=handles, loc="outside right upper", labelspacing=0.5)
    return figure


def _kind(row: ArmComparison, *, front: Sequence[ArmComparison]) -> str:
    """How an arm is drawn."""
    if row.arm.name == IDENTITY:
        return "identity"
    if row.arm.oracle:
        return "oracle"
    return "front" if row in front else "other"


def _draw_pareto(axes: Axes, group: Sequence[ArmComparison]) -> None:
    ratios = [
        row.paired.step_ratio.value
        for row in group
        if row.paired.step_ratio is not None and not row.arm.oracle
    ]
    # an oracle's cost would squeeze the methods, which are what is compared, into one column
    edge = max(ratios) + max(0.1, 0.2 * (max(ratios) - min(ratios))) if ratios else math.inf
    front = _front([row for row in group if not row.arm.oracle])
    for row in group:
        if row.paired.step_ratio is None:
            raise InputError(f"{row.label} has no steps; give steps and identity_steps")
        _draw_arm(axes, row, kind=_kind(row, front=front), edge=edge)
    if len(front) > 1:
        line = [_point(row) for row in front]
        axes.plot(*zip(*line, strict=True), drawstyle="steps-post", zorder=1, **_FRONT)
    axes.axvline(1, color=GRAY, lw=0.7, ls=":", zorder=0)
    axes.margins(x=0.2, y=0.12)  # names stand up and left of their points
    axes.yaxis.set_major_formatter(_percent)
    axes.xaxis.set_major_formatter(_percent)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("executed steps, of the identity's")
    axes.set_ylabel("answered right")
    axes.grid()


def _draw_arm(axes: Axes, row: ArmComparison, *, kind: str, edge: float) -> None:
    """Its point; of the front and the identity with intervals, of the front with its name."""
    place, at = _point(row)
    told: dict[str, Any] = {"textcoords": "offset points", "fontsize": 6, "ha": "right"}
    told["bbox"] = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
    if place > edge:
        axes.annotate(f"{place:.1f} ×", (edge, at), xytext=(-5, 0), va="center", **told)
        place = edge
    elif kind == "front":
        axes.annotate(row.label, (place, at), xytext=(-4, 3), va="bottom", **told)
    if kind not in ("front", "identity"):
        axes.plot([place], [at], ls="", **_LOOKS[kind])
        return
    share, ratio = row.paired.method, row.paired.step_ratio
    assert ratio is not None
    low, high = wilson(share.count, share.n)
    # Percentile intervals may end a rounding error inside the value, and error bars must not be
    # negative.
    x_error = [[max(0.0, ratio.value - ratio.low)], [max(0.0, ratio.high - ratio.value)]]
    y_error = [[at - low], [high - at]]
    axes.errorbar([place], [at], xerr=x_error, yerr=y_error, ls="", elinewidth=0.9, **_LOOKS[kind])


def _point(row: ArmComparison) -> tuple[float, float]:
    """Steps, as a ratio to the identity's, and accuracy."""
    assert row.paired.step_ratio is not None
    return row.paired.step_ratio.value, row.paired.method.count / row.paired.n


def _front(rows: Sequence[ArmComparison]) -> list[ArmComparison]:
    """The arms that no other with as few steps is as accurate as, by rising steps."""
    found: list[ArmComparison] = []
    known = [row for row in rows if row.paired.step_ratio is not None]
    for row in sorted(known, key=lambda row: (_point(row)[0], -_point(row)[1])):
        if not found or _point(row)[1] > _point(found[-1])[1]:
            found.append(row)
    return found


def gains(rows: Sequence[ArmComparison]) -> Figure:
    """Forest plot: each arm's gain over the identity in points with its 95 % interval, a panel for
    each task and the overall.

    Intervals that leave out 0 are colored: blue above, red below; oracles are hollow and named so.
    Raises InputError without rows, or with the identity alone.
    """
    rows = [row for row in rows if row.arm.name != IDENTITY]
    panels = _panels(rows)
    labels = list(dict.fromkeys(row.label for row in rows))
    columns, lines = _grid(len(panels), 4)
    figure = Figure(
        figsize=(
            1.2 + 0.07 * max(map(len, labels)) + 2.6 * columns,
            lines * (0.95 + 0.24 * len(labels)) + 0.4,
        )
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis, (task, group) in zip(axes.flat, panels.items(), strict=False):
        for row in group:
            gain, y = row.paired.gain, labels.index(row.label)
            color = BETTER if gain.low > 0 else WORSE if gain.high < 0 else GRAY
            face = "white" if row.arm.oracle else color
            error = [[max(0.0, gain.value - gain.low)], [max(0.0, gain.high - gain.value)]]
            axis.errorbar(
                [gain.value],
                [y],
                xerr=error,
                fmt="o",
                ms=5,
                lw=1.3,
                capsize=2,
                color=color,
                mfc=face,
            )
        axis.axvline(0, color=INK, lw=0.9)
        axis.set_title(f"{task}, n = {_questions(group)}")
        axis.set_xlabel("gain over the identity, points")
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)  # the first arm on top
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="x")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    key = [("interval above 0", BETTER, BETTER), ("holds 0", GRAY, GRAY), ("below 0", WORSE, WORSE)]
    key += [("oracle", GRAY, "white")] if any(row.arm.oracle for row in rows) else []
    handles = [
        Line2D([], [], color=color, mfc=face, marker="o", ms=5, lw=1.3, label=label)
        for label, color, face in key
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def reliability_diagram(reliability: Mapping[str, Reliability]) -> Figure:
    """Share that came true by predicted probability, with Wilson's 95 % intervals, over the counts;
    a column for each name.

    Raises InputError for no names.
    """
    if not reliability:
        raise InputError("no reliability to draw; give at least one, by name")
    names = list(reliability)
    figure = Figure(figsize=(3.2 * len(names) + 0.3, 4.2))
    axes = figure.subplots(2, len(names), squeeze=False, sharex=True, height_ratios=[3, 1])
    for column, name in enumerate(names):
        found = reliability[name]
        curve, counts = axes[:, column]
        x = np.array([each.mean for each in found.bins])
        y = np.array([each.outcomes.count / each.outcomes.n for each in found.bins])
        ends = np.array([wilson(each.outcomes.count, each.outcomes.n) for each in found.bins])
        curve.plot([0, 1], [0, 1], color=GRAY, lw=0.9, ls=":")
        curve.errorbar(
            x,
            y,
            yerr=[y - ends[:, 0], ends[:, 1] - y],
            color=BETTER,
            marker="o",
            ms=4,
            lw=1.2,
            capsize=2,
        )
        curve.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="came true" if not column else "")
        curve.set_title(f"{name}\nECE {100 * found.ece:.1f} %, {count(found.n, 'prediction')}")
        curve.grid()
        left = np.array([each.low for each in found.bins])
        # a bin of equal predictions has none
        width = np.maximum([each.high - each.low for each in found.bins], 0.004)
        counts.bar(
            left,
            [each.outcomes.n for each in found.bins],
            width,
            align="edge",
            color=BETTER,
            alpha=0.6,
            ec="white",
            lw=0.5,
        )
        counts.set(xlabel="predicted probability", ylabel="predictions" if not column else "")
        counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        counts.grid(axis="y")
    return figure


def _panels(rows: Sequence[ArmComparison]) -> dict[str, list[ArmComparison]]:
    """Rows by title, in the order given: the task, marked in a second line where the predictor was
    not trained on it.
    """
    if not rows:
        raise InputError("no arms to draw; give results of at least one besides the identity")
    panels: dict[str, list[ArmComparison]] = {}
    for row in rows:
        panels.setdefault(row.task_label.replace(" (", "\n("), []).append(row)
    return panels


def _grid(panels: int, most: int) -> tuple[int, int]:
    """Columns and lines."""
    lines = math.ceil(panels / most)
    return math.ceil(panels / lines), lines


def _questions(group: Sequence[ArmComparison]) -> str:
    return f"{group[0].paired.n:,}"
