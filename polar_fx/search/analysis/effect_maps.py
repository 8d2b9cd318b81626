"""Heat maps of single edits: what skipping or repeating some layers, and nothing else, changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

MAP_HEIGHT = 1.25  # inches of a row of maps
FEW = 5  # questions below which a cell gets a dot
MEASURES = {
    "correct": ("n", "change of accuracy"),
    "log_likelihood": ("n_log_likelihood", "change of log-likelihood (nats)"),
}
EditKind = tuple[str, int, float]  # op, times, damping
percent = FuncFormatter(lambda value, _: f"{100 * value:g} %".replace("-", "−"))


def edit_kinds(effects: Sequence[Mapping[str, Any]]) -> list[EditKind]:
    """The ops there are, a row of maps each."""
    return list(dict.fromkeys((e["op"], e["times"], e["damping"]) for e in effects))


def measures_of(effects: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured, a column of maps each."""
    return [name for name, (n, _) in MEASURES.items() if any(e[n] for e in effects)]


def draw_effects(
    axes: np.ndarray,
    effects: Sequence[Mapping[str, Any]],
    depth: int,
    kinds: Sequence[EditKind],
    measures: Sequence[str],
) -> None:
    """A map a kind and measure: start by length, red for worse and blue for better, gray where
    nothing was explored.
    """
    colors = matplotlib.colormaps["RdBu"].with_extremes(bad="#DDDDDD")
    for column, measure in enumerate(measures):
        n_name, label = MEASURES[measure]
        known = [e for e in effects if (e["op"], e["times"], e["damping"]) in kinds and e[n_name]]
        limit = _limit(
            [e[measure] for e in known if e[n_name] >= FEW] or [e[measure] for e in known]
        )
        mesh = None
        for row, kind in enumerate(kinds):
            here: Axes = axes[row, column]
            cells = [e for e in known if (e["op"], e["times"], e["damping"]) == kind]
            lengths = max((e["length"] for e in effects if e["op"] == kind[0]), default=1)
            values = np.full((lengths, depth), np.nan)
            for e in cells:
                values[e["length"] - 1, e["start"]] = e[measure]
            mesh = here.pcolormesh(
                np.arange(depth + 1) - 0.5,
                np.arange(lengths + 1) + 0.5,
                np.ma.masked_invalid(values),
                cmap=colors,
                norm=TwoSlopeNorm(0, -limit, limit),
                edgecolors="white",
                linewidth=0.4,
            )
            few = [e for e in cells if e[n_name] < FEW]
            here.scatter(
                [e["start"] for e in few],
                [e["length"] for e in few],
                s=2.5,
                color="#333333",
                linewidths=0,
            )
            here.set_facecolor("#DDDDDD")
            here.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 4, 10]))
            here.xaxis.set_major_locator(MaxNLocator(integer=True))
            here.spines[:].set_visible(False)
            here.tick_params(length=0)
            here.set_title(
                f"{_name(kind)}: {label}, {_questions([e[n_name] for e in cells])}",
                fontsize=8.5,
                weight="normal",
            )
            here.set_ylabel("length")
            if row == len(kinds) - 1:
                here.set_xlabel(
                    f"first layer of the edit (gray: not explored; dot: fewer than {FEW} questions)"
                )
        if mesh is not None:
            bar = axes[0, column].figure.colorbar(
                mesh,
                ax=list(axes[:, column]),
                fraction=0.04,
                pad=0.01,
                aspect=10 * len(kinds),
                extend="both",
            )
            bar.outline.set_visible(False)
            if measure == "correct":
                bar.ax.yaxis.set_major_formatter(percent)


def _limit(values: Sequence[float]) -> float:
    """The end of the colors: the few greatest changes are left beyond it, or they would make all
    others pale.
    """
    return (
        float(np.quantile(np.abs(values), 0.9) if len(values) else 0)
        or max(map(abs, values), default=0)
        or 1.0
    )


def _name(kind: EditKind) -> str:
    op, times, damping = kind
    if op == "skip":
        return "skip"
    return f"repeat, {times} runs" + (f" damped {damping:g}" if damping < 1 else "")


def _questions(counts: Sequence[int]) -> str:
    if not counts:
        return "no questions"
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low} to {high}"
