"""Pictures of programs by graphviz, and the plain text of tables; no model is needed."""

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest

from polar_fx.errors import InputError, PolarError
from polar_fx.explain.picture import program_dot, render_svg
from polar_fx.output.plain_text import count, ranges, size, table
from polar_fx.program import Program

NEEDS_DOT = pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz is not installed (apt install graphviz)"
)
BOX = re.compile(r"  block[0-9]+ \[(.*)\];")
CELL = re.compile(r'bgcolor="#[0-9a-f]{6}">([0-9]+)<')
EDGE = re.compile(r"  (\w+)\S* -> (\w+)\S* \[(.*)\];")


def _dot(program: Program) -> str:
    return program_dot(
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


@NEEDS_DOT
@pytest.mark.parametrize(
    "text",
    ["identity", "0 (2-3)*2@0.5", "3 2 1 0", "3 1 [0 1]@0.5 2", "[0 [1]@0.5 2]@0.25 0", "(1)*12"],
)
def test_graphviz_draws_it(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = _dot(Program.parse(text, 4))
    drawn = render_svg(source, tmp_path / "p.svg").read_text(encoding="utf-8")
    assert drawn.count('class="node"') == source.count("label=<") - 1, "all but the caption"
    assert drawn.count('class="edge"') == source.count(" -> ")
    assert [p.name for p in tmp_path.iterdir()] == ["p.svg"], "nothing else is left"
    assert capfd.readouterr() == ("", "")


@NEEDS_DOT
def test_a_picture_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere/p.svg"):
        render_svg(_dot(Program.identity(2)), tmp_path / "nowhere" / "p.svg")


def test_what_graphviz_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "dot"
    fake.write_text("#!/bin/sh\necho 'no such font' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "p.svg").write_text("the old one")
    with pytest.raises(PolarError, match="no such font"):
        render_svg("digraph {}", tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text() == "the old one"


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
