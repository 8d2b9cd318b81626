"""Figures of an analysis: whole, the same each time, and left out where there is nothing."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from polar_fx.errors import InputError
from polar_fx.search.analysis.summary import (
    SearchFile,
    analyze,
)
from polar_fx.search.records.records import SearchRecord
from search_samples import (
    HEADER,
    MOVED,
    SAMPLES,
    simple,
)


def _report(records: list[SearchRecord], *paths: str) -> dict[str, object]:
    return analyze(
        [SearchFile(path, HEADER, tuple(records)) for path in paths or ("runs/one.jsonl",)]
    )


KINDS = ("accuracy", "steps", "edits", "menu", "effects", "overview")


def test_svg_figures_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    report = _report(SAMPLES)
    first, second = (write_figures(report, tmp_path / name) for name in ("new/a", "b"))
    names = [f"one-{kind}.svg" for kind in KINDS]
    assert [path.name for path in first] == names
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and b"<dc:date>" not in one.read_bytes()
        assert ET.parse(one).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted((tmp_path / "b").iterdir()) == sorted(second)


def test_png_figures_of_several_files(tmp_path: Path) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    drawn = write_figures(_report(SAMPLES, "a/run.jsonl", "b/run.jsonl"), tmp_path, format="png")
    assert [path.name for path in drawn if "overview" in path.name] == [
        "run-overview.png",
        "run-2-overview.png",
    ]
    assert len([path for path in drawn if "menu" in path.name]) == 1  # the model's
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in drawn)


@pytest.mark.parametrize(
    ("records", "kinds"),
    [
        ([], ()),
        # one question is no menu
        (SAMPLES[:1], ("accuracy", "steps", "edits", "effects", "overview")),
        (SAMPLES[5:], ("accuracy", "overview")),
        ([simple("1", {MOVED}), simple("2", {MOVED})], ("accuracy", "steps", "overview")),
    ],
)
def test_figures_are_left_out_where_there_are_no_data(
    records: list[SearchRecord], kinds: tuple[str, ...], tmp_path: Path
) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    drawn = [
        re.sub(r"one-|\.svg", "", path.name) for path in write_figures(_report(records), tmp_path)
    ]
    assert [kind for kind in drawn if kind != "menu"] == list(kinds)


def test_figures_say_how_many(tmp_path: Path) -> None:
    """Bars, labels and limits of the accuracy figure."""
    figures = pytest.importorskip("polar_fx.search.analysis.figures")
    (axes,) = dict(figures.figures(_report(SAMPLES)))["one-accuracy"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "all\nn = 6",
        "add\nn = 3",
        "mul\nn = 3",
    ]
    heights = [bar.get_height() for bar in axes.patches]
    assert len(heights) == 12
    # a color after the other
    assert [heights[i] for i in (0, 3, 6, 9)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6])
    shares = axes.get_legend().get_texts()
    assert [text.get_text() for text in shares] == [
        "identity",
        "+ skips only",
        "+ repeats only",
        "+ any explored",
    ]


def test_bad_figure_arguments(tmp_path: Path) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    with pytest.raises(InputError, match="unknown figure format 'gif'; use one of svg, png"):
        write_figures(_report(SAMPLES), tmp_path, format="gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .*file"):
        write_figures(_report(SAMPLES), tmp_path / "file")
