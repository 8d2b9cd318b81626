"""Pictures of what `analysis.analyze` returns. They need matplotlib, of the extra `search`.

Colors are those of Okabe and Ito, which the color-blind tell apart. Nothing here touches pyplot or
its state.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from ...errors import InputError
from ...output.figure_style import FORMATS, style
from ...output.files import made_folder, write_whole
from ...output.plain_text import count
from ...stats.intervals import wilson
from .effect_maps import MAP_HEIGHT, draw_effects, edit_kinds, measures_of, percent

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#E69F00", "#009E73", "#7F7F7F"
ACCURACIES = {
    "baseline": ("identity", GRAY),
    "skip_only": ("+ skips only", BLUE),
    "repeat_only": ("+ repeats only", ORANGE),
    "both": ("+ any explored", GREEN),
}
_MOST_GROUPS = 12  # bars beyond are too thin to read; the tables have all


def write_figures(
    report: Mapping[str, Any], folder: str | Path, *, format: str = "svg"
) -> list[Path]:
    """Draw a report of `analyze` into a folder, which is made; returns the files, `<name of the
    record file>-<figure>.<format>`.

    Figures are accuracy, steps, edits, menu, effects and overview, without those that there are no
    data for. The same report gives the same SVG. Raises InputError for another format or a folder
    that cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"unknown figure format {format!r}; use one of {', '.join(FORMATS)}")
    folder = made_folder(folder)
    made = []
    with style():
        for name, figure in figures(report):
            file = io.BytesIO()
            figure.savefig(
                file, format=format, metadata={"Date": None} if format == "svg" else None
            )
            made.append(write_whole(file.getvalue(), folder / f"{name}.{format}"))
    return made


def figures(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Names and figures of a report of `analyze`, with matplotlib's settings as they are."""
    menus = {each["model"]: each for each in report["menus"]}
    names: list[str] = []
    drawn: set[str] = set()
    for file in report["files"]:
        stem = Path(file["path"]).stem
        names.append(stem)
        # of files in several folders
        name = stem if names.count(stem) == 1 else f"{stem}-{names.count(stem)}"
        if not file["summary"]["questions"]:
            continue
        menu = menus[file["model"]]
        groups = _groups(file)
        yield (
            f"{name}-accuracy",
            _single(
                draw_accuracy,
                file["summary"],
                groups,
                size=(max(5.0, 1.3 + 1.1 * len(groups)), 3.4),
            ),
        )
        if file["summary"]["steps"]["shortest"]:
            yield f"{name}-steps", _single(draw_steps, file["summary"], size=(6.4, 3.4))
        if _has_edits(file["summary"]):
            figure = Figure(figsize=(7.2, 3.2))
            lengths, times = figure.subplots(1, 2)
            draw_lengths(lengths, file["summary"])
            draw_times(times, file["summary"])
            yield f"{name}-edits", figure
        if _has_menu(menu) and file["model"] not in drawn:
            drawn.add(file["model"])
            yield f"{name}-menu", _single(draw_menu, menu, size=(6.4, 4.0))
        if file["effects"]:
            kinds, measures = edit_kinds(file["effects"]), measures_of(file["effects"])
            width = 0.9 + min(max(4.6, 0.17 * file["depth"]), 8.0)  # of a column
            figure = Figure(figsize=(width * len(measures), 0.5 + MAP_HEIGHT * len(kinds)))
            axes = figure.subplots(len(kinds), len(measures), squeeze=False)
            draw_effects(axes, file["effects"], depth=file["depth"], kinds=kinds, measures=measures)
            yield f"{name}-effects", figure
        yield f"{name}-overview", _overview(file, menu, groups=groups)


def _single(draw: Any, *data: Any, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size)
    draw(figure.subplots(), *data)
    return figure


def _overview(
    file: Mapping[str, Any], menu: Mapping[str, Any], *, groups: Sequence[tuple[str, Any]]
) -> Figure:
    found = file["summary"]
    kinds = [
        kind
        for kind in edit_kinds(file["effects"])
        if kind in (("skip", 1, 1.0), ("repeat", 2, 1.0))
    ]
    measures = measures_of(file["effects"]) if kinds else ()
    figure = Figure(figsize=(11.5, 6.6 + MAP_HEIGHT * len(kinds)))
    heights = [6.2, MAP_HEIGHT * len(kinds)] if kinds else [1]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplot_mosaic(
        [["accuracy", "accuracy", "menu"], ["steps", "lengths", "times"]]
    )
    draw_accuracy(axes["accuracy"], found, groups)
    draw_steps(axes["steps"], found)
    draw_lengths(axes["lengths"], found)
    draw_times(axes["times"], found)
    draw_menu(axes["menu"], menu)
    if kinds:
        draw_effects(
            parts[1].subplots(len(kinds), len(measures), squeeze=False),
            file["effects"],
            depth=file["depth"],
            kinds=kinds,
            measures=measures,
        )
    budget = f"{file['method']}, {file['simulations']} programs a question, reward {file['reward']}"
    title = (
        f"{Path(file['path']).name}: {count(found['questions'], 'question')}, {file['depth']} "
        f"layers, {budget}"
    )
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def _groups(file: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Labels and summaries of all and of the tasks, or else the difficulties, or else the cells, if
    there are a few.
    """
    tasks = [
        (g["task"], g["summary"])
        for g in file["groups"]
        if g["difficulty"] is None and g["cell"] is None
    ]
    levels = [
        (f"difficulty {g['difficulty']}", g["summary"])
        for g in file["groups"]
        if g["difficulty"] is not None
    ]
    cells = [(g["cell"], g["summary"]) for g in file["groups"] if g["cell"] is not None]
    # Difficulties and cells are those of one task.
    choice = (tasks,) if len(tasks) > 1 else (levels, cells)
    chosen = next((rows for rows in choice if 2 <= len(rows) <= _MOST_GROUPS), [])
    return [("all", file["summary"]), *chosen]


def _has_edits(found: Mapping[str, Any]) -> bool:
    return bool(found["edits"]["skip"] or found["edits"]["repeat"])


def _has_menu(menu: Mapping[str, Any]) -> bool:
    return bool(menu["menus"]["without_identity"]["programs"] and menu["held_out"])


def draw_accuracy(axes: Axes, found: Mapping[str, Any], groups: Sequence[tuple[str, Any]]) -> None:
    """Bars of the identity, and with skips, repeats and both, a group of bars each."""
    width = 0.2
    for index, (name, (label, color)) in enumerate(ACCURACIES.items()):
        shares = [group["accuracy"][name] for _, group in groups]
        x = np.arange(len(groups)) + (index - 1.5) * width
        heights = [share["share"] for share in shares]
        below = [share["share"] - share["low"] for share in shares]
        above = [share["high"] - share["share"] for share in shares]
        axes.bar(
            x,
            heights,
            width * 0.92,
            color=color,
            label=label,
            yerr=[below, above],
            error_kw={"lw": 0.9, "capsize": 1.5},
        )
        for at, share in zip(x, shares, strict=True):
            axes.text(
                at,
                share["high"] + 0.015,
                f"{100 * share['share']:.0f}",
                ha="center",
                va="bottom",
                fontsize=7,
            )
    axes.set_xticks(
        range(len(groups)), [f"{label}\nn = {group['questions']:,}" for label, group in groups]
    )
    _percent(axes, "questions answered right")
    axes.set_ylim(0, 1.1)
    axes.set_yticks(np.arange(0, 1.01, 0.25))
    axes.set_title("Oracle over explored programs, by the answer key (95 % intervals)", pad=20)
    _legend(axes, 4)


def draw_steps(axes: Axes, found: Mapping[str, Any]) -> None:
    """How many steps valid programs run, and the shortest of each question."""
    valid, shortest = (dict(map(tuple, found["steps"][name])) for name in ("valid", "shortest"))
    steps = np.arange(
        min([*valid, *shortest, found["depth"]]), max([*valid, *shortest, found["depth"]]) + 1
    )
    for counts, label, color in (
        (valid, "valid programs", BLUE),
        (shortest, "shortest right program of a question", ORANGE),
    ):
        if not counts:
            continue
        total = sum(counts.values())
        edges = np.append(steps, steps[-1] + 1) - 0.5
        shares = [counts.get(int(step), 0) / total for step in steps]
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.3)
        axes.stairs(shares, edges, color=color, lw=1.3, label=f"{label}, n = {total:,}")
    axes.axvline(found["depth"], color="#333333", lw=0.9, ls=":")
    axes.annotate(
        f" identity: {found['depth']}",
        (found["depth"], 0.98),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=8,
    )
    _percent(axes, "share")
    axes.set_xlabel("steps (layers executed)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Steps of right programs", pad=32)
    _legend(axes)


def draw_lengths(axes: Axes, found: Mapping[str, Any]) -> None:
    """How many layers the edits of valid programs take."""
    edits = found["edits"]
    parts = [("skips", edits["skip"], BLUE, -0.2), ("repeats", edits["repeat"], ORANGE, 0.2)]
    for name, counts, color, offset in parts:
        total = sum(n for _, n in counts)
        if total:
            x = [length + offset for length, _ in counts]
            axes.bar(
                x, [n / total for _, n in counts], 0.38, color=color, label=f"{name}, n = {total:,}"
            )
    _percent(axes, "share of the edits")
    axes.set_xlabel("layers an edit takes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Length of edits in valid programs", pad=20)
    _legend(axes, 2)


def draw_times(axes: Axes, found: Mapping[str, Any]) -> None:
    """How often repeated layers run."""
    counts = found["edits"]["times"]
    total = sum(n for _, n in counts)
    times = [value for value, _ in counts]
    if total:
        axes.bar(times, [n / total for _, n in counts], 0.7, color=ORANGE)
    else:
        _empty(axes)
    _percent(axes, "share of the repeats")
    axes.set_xlabel("times the layers run")
    axes.set_xticks(times)
    axes.set_title(f"Runs of repeats, n = {total:,}", pad=20)


def draw_menu(axes: Axes, menu: Mapping[str, Any]) -> None:
    """Coverage by the size of the menu."""
    n, curves = menu["held_out"], (("with_identity", GREEN), ("without_identity", BLUE))
    most = 1
    for name, color in curves:
        size = len(menu["menus"][name]["curve"]["held_out"]["covered"]) - 1
        most = max(most, size)
        if size and n:
            _draw_coverage(axes, menu, name=name, color=color)
    if n:
        _draw_bounds(axes, menu)
    axes.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= most]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    _percent(axes, "questions covered, at least")
    axes.set_ylim(0, 1)
    axes.set_xlabel("K, programs in the menu")
    axes.set_title(f"Menu coverage, n = {n:,} held out,\nranked on {menu['train']:,} others")
    if not axes.lines:
        _empty(axes)
        return
    axes.legend(
        ncols=2,
        loc="upper left",
        bbox_to_anchor=(-0.12, -0.18),
        handlelength=1.6,
        labelspacing=0.3,
        columnspacing=0.9,
    )


def _draw_coverage(axes: Axes, menu: Mapping[str, Any], *, name: str, color: str) -> None:
    """One way of choosing the menu: covered questions by its size, held out and in sample."""
    label = "identity + K" if name == "with_identity" else "K alone"
    n, curve = menu["held_out"], menu["menus"][name]["curve"]
    covered = curve["held_out"]["covered"][1:]
    k = np.arange(1, len(covered) + 1)
    intervals = np.array([wilson(each, n) for each in covered])
    axes.fill_between(k, intervals[:, 0], intervals[:, 1], color=color, alpha=0.15, lw=0)
    axes.plot(
        k,
        np.array(covered) / n,
        color=color,
        lw=1.6,
        marker="o" if len(covered) == 1 else None,
        label=f"{label}, held out",
    )
    in_sample = np.array(curve["in_sample"]["covered"][1:]) / menu["train"]
    axes.plot(k, in_sample, color=color, lw=1, ls="--", label=f"{label}, in sample")


def _draw_bounds(axes: Axes, menu: Mapping[str, Any]) -> None:
    """What the identity covers alone, and what all explored programs cover together."""
    found = menu["menus"]["with_identity"]
    axes.axhline(
        found["curve"]["held_out"]["covered"][0] / menu["held_out"],
        color=GRAY,
        lw=1,
        label="identity, held out",
    )
    axes.axhline(
        found["ceiling"]["held_out"]["share"],
        color="#333333",
        lw=0.9,
        ls=":",
        label="any explored, held out",
    )


def _legend(axes: Axes, columns: int = 1) -> None:
    """Between title and data; without data, a word on that."""
    if not axes.get_legend_handles_labels()[0]:
        _empty(axes)
        return
    axes.legend(
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        handlelength=1,
        columnspacing=1.2,
        borderpad=0.1,
    )


def _empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=GRAY)
    axes.set(xticks=[], yticks=[])


def _percent(axes: Axes, label: str) -> None:
    axes.yaxis.set_major_formatter(percent)
    axes.set_ylabel(label)
    axes.grid(axis="y")
