"""Pictures of programs, graphviz source, and the plain text of tables; no model is needed."""

import itertools
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from polar_fx.errors import PolarError
from polar_fx.explain.drawing import program_svg
from polar_fx.explain.picture import program_dot
from polar_fx.output.plain_text import count, ranges, size, table
from polar_fx.program import Program

SVG = "{http://www.w3.org/2000/svg}"
BOX = re.compile(r"  block[0-9]+ \[(.*)\];")
CELL = re.compile(r'bgcolor="#[0-9a-f]{6}">([0-9]+)<')
EDGE = re.compile(r"  (\w+)\S* -> (\w+)\S* \[(.*)\];")


def _dot(program: Program) -> str:
    return _drawn(program_dot, program)


def _drawn(draw: Callable[..., str], program: Program) -> str:
    return draw(
        program,
        ["a" if i % 3 else "b" for i in range(program.depth)],
        legend={"a": "1 & 2"},
        ends=("", "last"),
        title=str(program),
    )


def _random(pick: random.Random) -> Program:
    depth = pick.randint(1, 7)
    if pick.random() < 0.3:
        program = Program.identity(depth)
    else:
        program = Program.from_path(
            [pick.randrange(depth) for _ in range(pick.randint(1, 9))], depth
        )
    for _ in range(pick.randint(0, 3)):
        start = pick.randrange(program.num_steps)
        length = pick.randint(1, program.num_steps - start)
        if not any(
            b.start < start < b.stop or b.start < start + length < b.stop for b in program.blends
        ):
            program = program.repeat(start, length, pick.randint(2, 3), pick.choice([1.0, 0.5]))
    return program


def test_boxes_and_loops_add_up_to_the_program() -> None:
    """Read back from the source of random programs: every step, every skipped layer, every
    blend.
    """
    pick = random.Random(0)
    seen: set[str] = set()
    for _ in range(300):
        program = _random(pick)
        text = _dot(program)
        steps: list[int] = []
        skipped: list[int] = []
        edges = [m.groups() for m in EDGE.finditer(text)]
        loops = {
            a: int(style.split("x")[1].split()[0].rstrip('"'))
            for a, b, style in edges
            if a == b and "dotted" not in style
        }
        boxes = BOX.findall(text)
        for number, box in enumerate(boxes):
            layers = [int(n) for n in CELL.findall(box)]
            steps += layers * loops.get(f"block{number}", 1)
            if not layers:
                assert "dashed" in box
                skipped += _numbers(box.partition("</b> ")[2].partition("<")[0])
        assert tuple(steps) == program.path, program
        assert sorted(skipped) == sorted(set(range(program.depth)) - set(program.path)), program
        dotted = [style for _, _, style in edges if "dotted" in style]
        try:
            segments = program.segments()
        except PolarError:
            assert len(dotted) == len(program.blends)
        else:
            assert not dotted and text.count("@") - str(program).count("@") == sum(
                s.damping < 1 for s in segments
            )
            seen |= {str(s.op) for s in segments}
        main = [(a, b) for a, b, style in edges if "weight=8" in style]
        assert main[0][0] == "prologue" and main[-1][1] == "epilogue"
        assert all(one[1] == two[0] for one, two in itertools.pairwise(main)), (
            "one line from end to end"
        )
    assert seen == {"skip", "keep", "repeat"}


def _numbers(text: str) -> list[int]:
    """Inverse of `ranges`."""
    found: list[int] = []
    for part in text.replace(" .. ", "..").split(", "):
        if ".." in part:
            second, last = map(int, part.split(".."))
            found += range(second, last + 1, second - found[-1])
        elif "-" in part:
            first, last = map(int, part.split("-"))
            found += range(first, last + 1)
        else:
            found.append(int(part))
    return found


def test_many_passes_are_cut_short() -> None:
    text = _dot(Program.parse("(0)*4096 /2"))
    assert text.count("pass ") == 6 and "pass 4096" in text and "x4096" in text and len(text) < 5000


def test_text_is_escaped() -> None:
    assert "1 &amp; 2" in _dot(Program.identity(3))


@pytest.mark.parametrize("seed", range(4))
def test_the_drawing_adds_up_to_the_program(seed: int) -> None:
    """Read back from the SVG of random programs; what it says lies within its edges."""
    pick = random.Random(seed)
    for _ in range(40):
        program = _random(pick)
        root = ET.fromstring(_drawn(program_svg, program))
        steps: list[int] = []
        boxes = [each for each in root.iter(f"{SVG}g") if each.get("class") == "box"]
        loops = [text for text in root.findall(f"{SVG}text") if re.match(r"x\d", text.text or "")]
        times = {int(str(text.get("y"))): int(str(text.text).split()[0][1:]) for text in loops}
        skipped: list[int] = []
        for box in boxes:
            frame = box[0]
            y, height = int(str(frame.get("y"))), int(str(frame.get("height")))
            layers = [int(str(t.text)) for t in box.iter(f"{SVG}text") if t.get("class")]
            again = [n for at, n in times.items() if y < at < y + height]
            steps += layers * (again[0] if again else 1)
            if not layers:
                assert frame.get("stroke-dasharray")
                skipped += _numbers(box[1][0].tail or "")
        assert tuple(steps) == program.path, program
        assert sorted(skipped) == sorted(set(range(program.depth)) - set(program.path)), program
        width, height = int(str(root.get("width"))), int(str(root.get("height")))
        for each in root.iter():
            assert 0 <= int(each.get("x", 0)) <= width and 0 <= int(each.get("y", 0)) <= height


def test_a_drawing_escapes_text_and_cuts_many_passes_short() -> None:
    assert "1 &amp; 2" in _drawn(program_svg, Program.identity(3))
    drawn = _drawn(program_svg, Program.parse("(0)*4096 /2"))
    assert drawn.count("pass ") == 6 and "x4096" in drawn and len(drawn) < 5000


def test_plain_text() -> None:
    assert [ranges(n) for n in ([], [3], [0, 1, 2, 3, 5], [0, 2, 4], [0, 2, 4, 6, 7, 8])] == [
        "",
        "3",
        "0-3, 5",
        "0, 2, 4",
        "0, 2 .. 6, 7-8",
    ]
    assert ranges([0, 1, 2, 2, 1]) == "0-2, 2, 1"
    assert [size(n) for n in (0, 999, 1000, 25 * 10**5, 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.5 MB",
        "1.0 GB",
    ]
    assert (count(1, "step"), count(1040, "token")) == ("1 step", "1,040 tokens")
    assert table(("a", "n"), [("xyz", "1"), ("", "22")], right=("n",)) == [
        "a     n",
        "---  --",
        "xyz   1",
        "     22",
    ]
