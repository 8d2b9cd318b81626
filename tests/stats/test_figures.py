"""Figures of the protocol: what they show, that they read well with many arms, and that they come
out the same.
"""

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from polar_fx.errors import InputError
from polar_fx.stats.arms import (
    IDENTITY,
    OVERALL,
    SEEN,
    UNSEEN,
    ArmComparison,
    ArmResult,
    compare_arms,
)
from polar_fx.stats.calibration import Reliability, reliability

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from polar_fx.stats import figures  # noqa: E402

TASKS = ("addition", "multiplication", "sequences")


def results(arms: int = 4, tasks: tuple[str, ...] = TASKS, *, n: int = 120) -> list[ArmResult]:
    """The identity, arms that get better and slower by number, and an oracle that is the last."""
    found: list[ArmResult] = []
    for at, task in enumerate(tasks):
        rng = np.random.default_rng(at)
        identity = rng.random(n) < 0.4
        found.append(ArmResult(IDENTITY, task, identity, identity, np.full(n, 30), np.full(n, 30)))
        for index in range(1, arms):
            right = np.where(rng.random(n) < 0.3, rng.random(n) < index / arms, identity)
            steps = rng.integers(18 + index, 24 + index, n)
            found.append(
                ArmResult(
                    f"arm {index}",
                    task,
                    right,
                    identity,
                    steps,
                    np.full(n, 30),
                    oracle=index == arms - 1,
                )
            )
    return found


def compared(**more: Any) -> list[ArmComparison]:
    return compare_arms(results(**more), resamples=200)


def calibrated(n: int = 500) -> dict[str, Reliability]:
    rng = np.random.default_rng(0)
    p = rng.random(n)
    return {
        "raw": reliability(p**2, rng.random(n) < p),
        "scaled": reliability(p, rng.random(n) < p, equal="width"),
    }


def _points(axes: Axes) -> dict[tuple[float, float], Any]:
    """Face color of each point."""
    marks = [
        line
        for line in axes.lines
        if line.get_marker() not in ("None", "", None, "|", "_") and len(_xy(line)) == 1
    ]
    return {(float(x), float(y)): m.get_markerfacecolor() for m in marks for x, y in _xy(m)}


def _xy(line: Line2D) -> np.ndarray:
    """Its points, f64[N, 2]."""
    return np.array([line.get_xdata(), line.get_ydata()], dtype=float).T


def test_pareto_has_a_point_an_arm_and_hollow_oracles() -> None:
    rows = compared()
    figure = figures.pareto(rows)
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert titles == [f"{OVERALL}, n = 360", *(f"{task}, n = 120" for task in TASKS)]
    for axes, task in zip(figure.axes, (OVERALL, *TASKS), strict=True):
        here = [row for row in rows if row.arm.task == task]
        points = _points(axes)
        assert len(points) == len(here) == 4
        for row in here:
            assert row.paired.step_ratio is not None and row.paired.method.value is not None
            face = points[row.paired.step_ratio.value, row.paired.method.value]
            assert (face == "white") is row.arm.oracle
    (legend,) = figure.legends
    labels = [IDENTITY, "front, without oracles", "other arms", "oracle"]
    assert [text.get_text() for text in legend.get_texts()] == labels


def test_the_front_leaves_out_oracles_and_beaten_arms() -> None:
    n = 10

    def one(name: str, right: int, *, steps: int, oracle: bool = False) -> ArmResult:
        return ArmResult(
            name,
            "addition",
            np.arange(n) < right,
            np.arange(n) < 5,
            np.full(n, steps),
            np.full(n, 30),
            oracle=oracle,
        )

    rows = compare_arms(
        [
            one(IDENTITY, 5, steps=30),
            one("beaten", 4, steps=20),
            one("short", 4, steps=15),
            one("best", 7, steps=25),
            one("key", 9, steps=5, oracle=True),
        ]
    )
    axes = figures.pareto(rows).axes[0]
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert _xy(line).tolist() == [[0.5, 0.4], [25 / 30, 0.7]]
    named = [text.get_text() for text in axes.texts]
    assert named == ["short", "best"], "nothing else is named"
    assert len(axes.collections) == 2 * 3, "intervals of these and of the identity"


def test_gains_show_intervals_and_color_what_leaves_out_zero() -> None:
    rows = compared()
    figure = figures.gains(rows)
    for axes, task in zip(figure.axes, (OVERALL, *TASKS), strict=True):
        here = [row for row in rows if row.arm.task == task and row.arm.name != IDENTITY]
        points = _points(axes)
        assert len(points) == len(here) == 3
        for y, row in enumerate(here):
            gain = row.paired.gain
            color = (
                figures.BETTER if gain.low > 0 else figures.WORSE if gain.high < 0 else figures.GRAY
            )
            assert points[gain.value, y] == ("white" if row.arm.oracle else color)
            (bar,) = axes.collections[y].get_segments()  # type: ignore[attr-defined]
            assert bar[:, 0].tolist() == pytest.approx([gain.low, gain.high])
        assert any(_xy(line)[:, 0].tolist() == [0, 0] for line in axes.lines)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "arm 1",
        "arm 2",
        "arm 3 (oracle)",
    ]
    assert "oracle" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_tasks_not_trained_on_are_marked() -> None:
    others = results(tasks=("division", "comparison-of-words"))
    rows = compare_arms(
        [*results(), *(replace(each, unseen=True) for each in others)], resamples=50
    )
    expected = [f"{SEEN}, n = 360", f"{UNSEEN}, n = 240", *(f"{task}, n = 120" for task in TASKS)]
    expected += [f"{task}\n({UNSEEN}), n = 120" for task in ("division", "comparison-of-words")]
    with figures.style():
        for figure in (figures.pareto(rows), figures.gains(rows)):
            assert [
                axes.get_title(loc="left") or axes.get_title() for axes in figure.axes
            ] == expected
            figure.draw_without_rendering()
            boxes = [axes.get_tightbbox() for axes in figure.axes]
            for one, other in itertools.combinations(boxes, 2):
                assert one is not None and other is not None and not one.overlaps(other)


def test_reliability_shows_bins_and_counts() -> None:
    found = calibrated()
    figure = figures.reliability_diagram(found)
    curves, counts = figure.axes[:2], figure.axes[2:]
    for (name, each), curve, count in zip(found.items(), curves, counts, strict=True):
        line = next(line for line in curve.lines if line.get_marker() == "o")
        assert _xy(line)[:, 1].tolist() == [b.outcomes.count / b.outcomes.n for b in each.bins]
        for patch, found_bin in zip(count.patches, each.bins, strict=True):
            assert patch.get_height() == found_bin.outcomes.n  # type: ignore[attr-defined]
        assert (curve.get_title(loc="left") or curve.get_title()).startswith(
            f"{name}\nECE {100 * each.ece:.1f} %"
        )


def test_nothing_overlaps_with_fifteen_arms() -> None:
    rows = compared(arms=16, tasks=(*TASKS, "subtraction", "word-problems"))
    with figures.style():
        for figure in (figures.pareto(rows), figures.gains(rows)):
            figure.draw_without_rendering()
            legend = figure.legends[0].get_window_extent()
            assert len(figure.axes) == 6
            boxes = [axes.get_tightbbox() for axes in figure.axes]
            assert all(box is not None and not box.overlaps(legend) for box in boxes)
            for box in (*boxes, legend):
                assert box is not None and box.x0 >= -1 and box.y0 >= -1
                assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


def test_files_come_out_the_same(tmp_path: Path) -> None:
    first, again = (
        figures.draw_compared(
            compare_arms(results(), resamples=200), tmp_path / name, reliability=calibrated()
        )
        for name in ("first", "again")
    )
    names = [f"{n}.{end}" for n in ("pareto", "gains", "reliability") for end in ("svg", "png")]
    assert [each.name for each in first] == names
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    for each in first:
        if each.suffix == ".svg":
            root = ET.fromstring(each.read_text())
            assert root.tag.endswith("svg") and "<dc:date>" not in each.read_text()
        else:
            assert each.read_bytes().startswith(b"\x89PNG") and b"Software" not in each.read_bytes()


def test_settings_are_those_of_the_user_afterwards(tmp_path: Path) -> None:
    plain = figures.draw_compared(
        compare_arms(results(), resamples=50), tmp_path / "plain", formats=["svg"]
    )
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "mine"}):
        own = figures.draw_compared(
            compare_arms(results(), resamples=50), tmp_path / "own", formats=["svg"]
        )
        assert matplotlib.rcParams["font.size"] == 30
    assert list(map(Path.read_bytes, plain)) == list(map(Path.read_bytes, own))


def test_one_task_and_one_arm() -> None:
    rows = compared(arms=2, tasks=("addition",))
    assert [len(figure.axes) for figure in (figures.pareto(rows), figures.gains(rows))] == [1, 1]
    assert isinstance(figures.pareto(rows[:1]), Figure)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown figure format 'gif'; use one of svg, png"):
        figures.draw_compared(compare_arms(results(), resamples=50), tmp_path, formats=["gif"])
    for draw in (
        lambda: figures.pareto([]),
        lambda: figures.gains(compared(arms=1, tasks=("addition",))),
    ):
        with pytest.raises(InputError, match="no arms to draw"):
            draw()
    with pytest.raises(InputError, match="no reliability"):
        figures.reliability_diagram({})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        figures.draw_compared(compare_arms(results(), resamples=50), tmp_path / "file" / "folder")
