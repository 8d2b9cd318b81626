"""Draw README's figure, accuracy against executed steps with 95 % intervals, from a committed
evaluation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from polar_fx.output.figure_style import style

_RESULTS = Path(__file__).parent / "results" / "evaluate-cpu-bfloat16.json"
_OUT = Path(__file__).parent.parent / "docs" / "figures" / "front.svg"
_BLUE, _INK, _GRAY = "#0072B2", "#333333", "#7F7F7F"
_IDENTITY = "identity"
# Ways to choose a program for each input, and programs for all inputs; and how they are told.
_OURS = {
    "selector: mean steps <= 0.7": "0.7",
    "selector: mean steps <= 0.8": "0.8",
    "selector: mean steps <= 0.85": "0.85",
    "selector: mean steps <= 0.9": "0.9",
    "selector: mean steps <= 0.95": "0.95",
    "selector: accuracy": "accuracy",
}
_OTHERS = {
    "best static program": "best program for all",
    "best static program <= 0.9 steps": "best program for all, 27 steps",
    "block-influence pruning, 27 steps": "block-influence pruning",
    "per-layer router (DR.LLM-style)": "a router in each layer",
    "random program of 27 steps": "random 27 layers",
}


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--out", type=Path, default=_OUT)
    options = parser.parse_args()
    arms = {
        arm["arm"]: arm
        for arm in json.loads(options.results.read_text())["arms"]
        if arm["task"] == "overall"
    }
    with style():
        drawn(arms).savefig(options.out, metadata={"Date": None})
    print(options.out)


def drawn(arms: dict[str, dict[str, Any]]) -> Figure:
    """The figure, of the arms over all tasks by their names."""
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    steps, shares = zip(*(_point(arms[name]) for name in _OURS), strict=True)
    axes.plot(steps, shares, color=_BLUE, lw=1)
    for names, color in ((_OURS, _BLUE), (_OTHERS, _GRAY)):
        for name, label in names.items():
            _mark(axes, arms[name], label=label, color=color)
    _mark(axes, arms[_IDENTITY], label="the model itself", color=_INK, marker="*")
    axes.axhline(_point(arms[_IDENTITY])[1], color=_INK, lw=0.6, ls=":")
    middle = len(steps) // 2
    axes.annotate(
        "a program for each question\n(by budgets of steps, or without one)",
        (steps[middle], shares[middle]),
        xytext=(0, 26),
        textcoords="offset points",
        ha="center",
        color=_BLUE,
    )
    percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_formatter(percent)
    axes.set(
        xlabel="executed layers, of the model's own",
        ylabel=f"right, of {arms[_IDENTITY]['n']:,} questions",
        xlim=(0.62, 1.22),
        ylim=(0, 0.21),
    )
    axes.grid(True)
    return figure


def _point(arm: dict[str, Any]) -> tuple[float, float]:
    """Steps of the identity's, and the share of right answers."""
    return arm["step_ratio"]["value"], arm["method"]["share"]


def _mark(axes: Any, arm: dict[str, Any], *, label: str, color: str, marker: str = "o") -> None:
    """A point with its interval and its name."""
    x, y = _point(arm)
    spread = [[y - arm["method"]["low"]], [arm["method"]["high"] - y]]
    size = 10 if marker == "*" else 4
    axes.errorbar(x, y, spread, color=color, marker=marker, ms=size, lw=1)
    axes.annotate(
        label,
        (x, y),
        xytext=(0, 11) if color == _BLUE else (6, 3),
        textcoords="offset points",
        ha="center" if color == _BLUE else "left",
        fontsize=8,
        color=color,
    )


if __name__ == "__main__":
    main()
