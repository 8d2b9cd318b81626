"""Heat maps of single edits: what skipping or repeating some layers, and nothing else, changes."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
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
    return [name for name, (n, _) in MEASURES.items() if any(map(itemgetter(n), effects))]


def draw_effects(
    axes: np.ndarray,
    effects: Sequence[Mapping[str, Any]],
    *,
    depth: int,
    kinds: Sequence[EditKind],
    measures: Sequence[str],
) -> None:
    """A map a kind and measure: start by length, red for worse and blue for better, gray where
    nothing was explored.
    """
    for column, measure in enumerate(measures):
        n_name, _ = MEASURES[measure]
        known = [e for e in effects if (e["op"], e["times"], e["damping"]) in kinds and e[n_name]]
        reliable = [e for e in known if e[n_name] >= FEW]
        limit = _limit([e[measure] for e in reliable or known])
        mesh = None
        for here, kind in zip(axes[:, column], kinds, strict=True):
            lengths = max((e["length"] for e in effects if e["op"] == kind[0]), default=1)
            cells = [e for e in known if (e["op"], e["times"], e["damping"]) == kind]
            mesh = _draw_map(here, cells, measure=measure, shape=(lengths, depth), limit=limit)
            _label_map(here, cells, kind=kind, measure=measure)
        if mesh is not None:
            axes[-1, column].set_xlabel(
                f"first layer of the edit (gray: not explored; dot: fewer than {FEW} questions)"
            )
            _draw_bar(axes[:, column], mesh, measure=measure)


def _draw_map(
    axes: Axes,
    cells: Sequence[Mapping[str, Any]],
    *,
    measure: str,
    shape: tuple[int, int],
    limit: float,
) -> QuadMesh:
    """Values of the cells by length and start, and dots on those of few questions."""
    lengths, depth = shape
    values = np.full(shape, np.nan)
    for e in cells:
        values[e["length"] - 1, e["start"]] = e[measure]
    mesh = axes.pcolormesh(
        np.arange(depth + 1) - 0.5,
        np.arange(lengths + 1) + 0.5,
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps["RdBu"].with_extremes(bad="#DDDDDD"),
        norm=TwoSlopeNorm(0, -limit, limit),
        edgecolors="white",
        linewidth=0.4,
    )
    few = [e for e in cells if e[MEASURES[measure][0]] < FEW]
    starts = [e["start"] for e in few]
    axes.scatter(starts, [e["length"] for e in few], s=2.5, color="#333333", linewidths=0)
    return mesh


def _label_map(
    axes: Axes, cells: Sequence[Mapping[str, Any]], *, kind: EditKind, measure: str
) -> None:
    n_name, label = MEASURES[measure]
    axes.set_facecolor("#DDDDDD")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 4, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    questions = _questions([e[n_name] for e in cells])
    axes.set_title(f"{_name(kind)}: {label}, {questions}", fontsize=8.5, weight="normal")
    axes.set_ylabel("length")


def _draw_bar(column: np.ndarray, mesh: QuadMesh, *, measure: str) -> None:
    """The colors of a column of maps."""
    bar = column[0].figure.colorbar(
        mesh,
        ax=list(column),
        fraction=0.04,
        pad=0.01,
        aspect=10 * len(column),
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
