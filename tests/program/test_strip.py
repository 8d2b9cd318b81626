"""Strips of programs: what each cell says, in text and as SVG."""

from xml.etree import ElementTree

import pytest

from polar_fx.program import Program
from polar_fx.program.strip import LEGEND, CellState, legend_svg

TEXTS = {
    "identity": (12, "■■■■■■■■■■ ■■"),
    "skip 3-5": (8, "■■■···■■"),
    "repeat 1-2 x3": (4, "■33■"),
    "repeat 1-2 x3 @0.5": (4, "■³³■"),
    "0 [1-2]@0.5 3": (4, "■▪▪■"),
    "3 2": (4, "··■■"),
    "(0)*12": (2, "+·"),
    "(0)*12@0.5": (1, "⁺"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text(text: str) -> None:
    depth, want = TEXTS[text]
    assert str(Program.parse(text, depth).strip()) == want


def test_every_mark_is_in_the_legend() -> None:
    marks = {mark for _, text in TEXTS.values() for mark in text} - set(" 3³⁺")
    assert all(f"{mark} " in LEGEND for mark in marks), "a number stands for all numbers"


def test_svg_has_a_cell_for_each_layer_that_says_what_happens_to_it() -> None:
    program = Program.parse("0 2-10 (11)*12 ([12]@0.5)*2", 13)
    drawn = ElementTree.fromstring(program.strip().svg())
    cells = [e for e in drawn if e.tag.endswith("rect")]
    titles = [cell[0].text for cell in cells]
    assert len(cells) == 13 and titles[:2] == ["layer 0: run once", "layer 1: skipped"]
    assert titles[11:] == ["layer 11: run 12 times", "layer 12: run twice, damped"]
    assert [e.text for e in drawn if e.tag.endswith("text")] == ["+", "2", "0", "10"]
    assert drawn.attrib["aria-label"] == "24 steps over 13 layers: ■·■■■■■■■■ ■+²"
    rights = [float(cell.attrib["x"]) + float(cell.attrib["width"]) for cell in cells]
    assert rights == sorted(rights) and rights[-1] < float(drawn.attrib["width"])


def test_ticks_can_be_left_out() -> None:
    strip = Program.identity(20).strip()
    heights = [ElementTree.fromstring(strip.svg(t)).attrib["height"] for t in (True, False)]
    assert int(heights[0]) > int(heights[1]) and "<text" not in strip.svg(ticks=False)


def test_kinds_of_cells_look_different_in_shape_or_line_not_in_color_alone() -> None:
    cells = Program.parse("0 2-3 (4)*2 [5]@0.5", 6).strip().cells
    assert {cell.state for cell in cells} == set(CellState)
    drawn = ElementTree.fromstring(legend_svg())
    looks = [{**rect.attrib} for rect in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    without_color = [
        (look["rx"], "stroke-dasharray" in look, look["fill"] == "none") for look in looks
    ]
    assert len(looks) == 4 and len(set(without_color)) == 3, "run once has no number"


def test_notebooks_show_the_strip_and_the_text() -> None:
    shown = Program.parse("skip 5", 30)._repr_html_()
    assert "<svg" in shown and "0-4 6-29 /30" in shown and "29 steps, 97% of the layers" in shown
    ElementTree.fromstring(shown.replace("<br>", "<br/>"))
