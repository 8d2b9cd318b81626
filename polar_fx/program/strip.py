"""Strips: a program as a row of cells, one for each layer, in text and as SVG.

A strip says how often each layer runs and whether it is damped, not in which order; the program's
text says that.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .parts import Blend

LEGEND = "· skipped   ■ once   2 run twice   ² run twice, damped   ▪ once, damped   + over 9 times"
"""What the marks of `Strip.text` mean."""

_GROUP = 10
_PLAIN, _DAMPED = "·■23456789+", "·▪²³⁴⁵⁶⁷⁸⁹⁺"

# Of a drawn cell, in user units. Colors hold on white and on black, and shapes differ as well.
_WIDTH, _HEIGHT, _GAP, _WIDER = 14, 20, 2, 6
_TICKS = 14  # height of the layer numbers
_INK, _QUIET = "#1b1f24", "#6e7781"
_FONT = "ui-sans-serif,system-ui,sans-serif"


class CellState(StrEnum):
    """What a program does with one layer. A damped layer is one in a blend, however often it
    runs.
    """

    SKIPPED = "skipped"
    ONCE = "once"
    REPEATED = "repeated"
    DAMPED = "damped"


_LOOKS = {
    CellState.SKIPPED: (
        f'rx="2" fill="none" stroke="{_QUIET}" stroke-width="1.4" stroke-dasharray="2 2"'
    ),
    CellState.ONCE: 'rx="2" fill="#6ea3d8" stroke="#6ea3d8"',
    CellState.REPEATED: 'rx="2" fill="#f0a24a" stroke="#f0a24a"',
    CellState.DAMPED: 'rx="7" fill="#f6d9ae" stroke="#d9822b"',
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer: how many steps run it, and whether one of them lies in a blend."""

    layer: int
    runs: int
    is_damped: bool

    @property
    def state(self) -> CellState:
        if self.is_damped:
            return CellState.DAMPED
        return (CellState.SKIPPED, CellState.ONCE, CellState.REPEATED)[min(self.runs, 2)]

    @property
    def mark(self) -> str:
        """The layer as one character of a terminal (`LEGEND`)."""
        return (_DAMPED if self.is_damped else _PLAIN)[min(self.runs, 10)]

    def __str__(self) -> str:
        """`layer 10: run 3 times, damped`."""
        runs = {0: "skipped", 1: "run once", 2: "run twice"}.get(
            self.runs, f"run {self.runs} times"
        )
        return f"layer {self.layer}: {runs}{', damped' if self.is_damped else ''}"


@dataclass(frozen=True, slots=True)
class Strip:
    """A program as cells, one for each layer of the model, in the order of the layers."""

    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, depth: int, path: Sequence[int], *, blends: Sequence[Blend]) -> "Strip":
        """The strip of a program's fields."""
        runs = [0] * depth
        for layer in path:
            runs[layer] += 1
        damped = {layer for blend in blends for layer in path[blend.start : blend.stop]}
        return cls(tuple(Cell(layer, n, layer in damped) for layer, n in enumerate(runs)))

    @property
    def num_steps(self) -> int:
        return sum(cell.runs for cell in self.cells)

    def text(self) -> str:
        """One mark a layer, ten to a group: `■■■■■·■■■■ ■■`; `LEGEND` says what they mean."""
        marks = "".join(cell.mark for cell in self.cells)
        return " ".join(marks[i : i + _GROUP] for i in range(0, len(marks), _GROUP))

    __str__ = text

    def svg(self, ticks: bool = True) -> str:
        """An `<svg>` element that needs nothing else, for a page or a file.

        With `ticks`, numbers under the cells name every tenth layer. Each cell has a title, which
        browsers show under the pointer; the whole has a label for those who hear it read.
        """
        last = len(self.cells) - 1
        width, height = _left(last) + _WIDTH + 1, _HEIGHT + 2 + (_TICKS if ticks else 0)
        label = html.escape(f"{self.num_steps} steps over {len(self.cells)} layers: {self}")
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{label}" '
            f'font-family="{_FONT}" text-anchor="middle" style="max-width:100%">',
            *(drawn for cell in self.cells for drawn in _drawn(cell)),
        ]
        if ticks:
            parts += [
                f'<text x="{_left(layer) + _WIDTH / 2}" y="{height - 2}" font-size="10" '
                f'fill="{_QUIET}">{layer}</text>'
                for layer in range(0, last + 1, _GROUP)
            ]
        return "".join([*parts, "</svg>"])


def legend_svg() -> str:
    """The looks of the four kinds of cells, with their names, as an `<svg>` element."""
    shown = (
        (Cell(0, 0, False), "skipped"),
        (Cell(0, 1, False), "run once"),
        (Cell(0, 2, False), "repeated, with the number of runs"),
        (Cell(0, 2, True), "damped"),
    )
    x, parts = 0, list[str]()
    for cell, name in shown:
        parts.append(f'<g transform="translate({x} 0)">{"".join(_drawn(cell))}</g>')
        parts.append(
            f'<text x="{x + _WIDTH + 6}" y="15" font-size="11" text-anchor="start" '
            f'fill="{_QUIET}">{name}</text>'
        )
        x += _WIDTH + 24 + round(5.6 * len(name))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x} {_HEIGHT + 2}" width="{x}" '
        f'height="{_HEIGHT + 2}" role="img" aria-label="legend" font-family="{_FONT}" '
        f'text-anchor="middle" style="max-width:100%">{"".join(parts)}</svg>'
    )


def _left(layer: int) -> int:
    """Where the cell of a layer begins: groups of ten stand a little apart."""
    return 1 + layer * (_WIDTH + _GAP) + layer // _GROUP * _WIDER


def _drawn(cell: Cell) -> Iterator[str]:
    x = _left(cell.layer)
    yield (
        f'<rect x="{x}" y="1" width="{_WIDTH}" height="{_HEIGHT}" {_LOOKS[cell.state]}>'
        f"<title>{cell}</title></rect>"
    )
    if cell.runs > 1:
        yield (
            f'<text x="{x + _WIDTH / 2}" y="15" font-size="11" fill="{_INK}" '
            f'pointer-events="none">{_PLAIN[min(cell.runs, 10)]}</text>'
        )
