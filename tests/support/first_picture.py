"""The picture at the top of the README: what programs answer to one question, each as a strip.

PYTHONPATH=tests/support python tests/support/first_picture.py    writes docs/figures/programs.svg
"""

import html
from collections.abc import Sequence

from places import ROOT
from polar_fx.program import Program
from polar_fx.program.strip import legend_svg

FILE = ROOT / "docs" / "figures" / "programs.svg"
DEPTH = 30
QUESTION, RIGHT = "6 * 7 =", "42"
# as the README's first block prints them, which test_readme.py holds
ANSWERS = (("identity", "36"), ("skip 5", "42"), ("repeat 14-15 x2 @0.5", "36"))

_INK = "#6e7781"  # readable on white and on black
_GREEN, _RED = "#2da44e", "#e5534b"
_LEFT, _TOP, _ROW, _STRIP = 168, 34, 44, 500


def picture(answers: Sequence[tuple[str, str]]) -> str:
    """The SVG for programs and what they answer."""
    width, height = _LEFT + _STRIP + 82, _TOP + _ROW * len(answers) + 30
    font = 'font-family="ui-sans-serif,system-ui,sans-serif"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" {font}>',
        f"<title>Programs of a model of {DEPTH} layers on {html.escape(QUESTION)}</title>",
        _text(0, 18, text="program", size=12),
        _text(_LEFT, 18, text=f"layers 0 to {DEPTH - 1}", size=12),
        _text(_LEFT + _STRIP + 10, 18, text=QUESTION, size=12),
    ]
    for row, (program, answer) in enumerate(answers):
        y = _TOP + row * _ROW
        right = answer == RIGHT
        parts += [
            _text(0, y + 15, text=program),
            f'<g transform="translate({_LEFT} {y})">',
            Program.parse(program, DEPTH).strip().svg(),
            "</g>",
            _text(
                _LEFT + _STRIP + 10,
                y + 17,
                text=f"{answer} {'✓' if right else '✗'}",
                size=18,
                color=_GREEN if right else _RED,
            ),
        ]
    y = _TOP + _ROW * len(answers)
    parts.append(f'<g transform="translate({_LEFT} {y})">{legend_svg()}</g></svg>\n')
    return "\n".join(parts)


def _text(x: int, y: int, *, text: str, size: int = 13, color: str = _INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}">{html.escape(text)}</text>'


if __name__ == "__main__":
    FILE.write_text(picture(ANSWERS), encoding="utf-8")
