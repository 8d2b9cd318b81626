"""A program as an SVG picture: prologue, boxes of layers from top to bottom, epilogue."""

import html
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..program import Program
from .blocks import (
    END,
    FONT,
    INK,
    LINE,
    PAPER,
    QUIET,
    TITLE_COLUMNS,
    WRAP,
    Block,
    blocks_of,
    fills_of,
    heads_of,
    notes_of,
)

_CELL, _CELL_HEIGHT, _GAP = 26, 20, 2
_MARGIN, _PAD, _SPACE, _LOOP, _BLEND = 16, 8, 26, 34, 40
_SIZE, _SMALL, _BIG = 11, 10, 14
_WIDE = 0.58  # of a character, as a share of its size: no font is measured


@dataclass(frozen=True)
class _Box:
    """A box to be drawn: its content, where it lies, and whether the program runs it."""

    name: str
    op: str
    head: str
    small: str
    rows: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    runs: bool
    is_end: bool
    y: int

    @property
    def width(self) -> int:
        head = _wide(f"{self.op} {self.head}", _SIZE) + _wide(self.small, _SMALL)
        cells = max((len(row) for row in self.rows), default=0) * (_CELL + _GAP)
        notes = max((_wide(note, _SMALL) for note in self.notes), default=0)
        return max(head, cells, notes) + 2 * _PAD

    @property
    def height(self) -> int:
        cells = len(self.rows) * (_CELL_HEIGHT + _GAP)
        return 2 * _PAD + 12 + (6 + cells if cells else 0) + 14 * len(self.notes)


def program_svg(
    program: Program,
    kinds: Sequence[str],
    *,
    legend: Mapping[str, str],
    ends: tuple[str, str],
    title: str,
) -> str:
    """An SVG document: prologue, the program's steps as boxes of layers, epilogue.

    `kinds` names the kind of each layer, which gives it its color; `legend` says more about a kind,
    `ends` about prologue and epilogue. Repeats have a loop, skipped layers stand beside the line,
    dashed; further lines of `title` are set small.
    """
    fills = fills_of(list(dict.fromkeys(kinds)))
    blocks, segmented = blocks_of(program)
    caption, y = _caption(title, {name: legend.get(name, "") for name in fills}, fills=fills)
    boxes = _laid_out(blocks, segmented=segmented, ends=ends, y=y)
    run = [box for box in boxes if box.runs]
    blends = [] if segmented else list(_blends(program, blocks, boxes=boxes))
    left = _MARGIN + _BLEND * len(blends)
    center = left + max(box.width for box in run) // 2
    parts = [*caption, *_lines(run, center=center)]
    for box in boxes:
        x = center - box.width // 2 if box.runs else center + 20
        parts += _drawn(box, x=x, kinds=kinds, fills=fills)
        if not box.runs:
            parts.append(_bypass(box, center=center))
    drawn = zip(boxes[1:-1], blocks, strict=True)
    parts += [_loop(box, block, center=center) for box, block in drawn if len(block.passes) > 1]
    for number, (one, two, damping) in enumerate(blends):
        parts.append(_blend(one, two, damping=damping, at=center, x=_MARGIN + _BLEND * number))
    beside = [center + 20 + box.width for box in boxes if not box.runs]
    loops = [center + box.width // 2 + _LOOP + 90 for box in run]
    longest = max(_wide(line, _BIG) for line in (*title.splitlines(), " " * TITLE_COLUMNS))
    width = max([*beside, *loops, min(longest, 560) + _MARGIN]) + _MARGIN
    height = boxes[-1].y + boxes[-1].height + _MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="{FONT}" font-size="{_SIZE}" fill="{INK}">'
    )
    arrow = (
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{LINE}"/></marker></defs>'
    )
    paper = f'<rect width="{width}" height="{height}" fill="{PAPER}"/>'
    return "\n".join([head, arrow, paper, *parts, "</svg>", ""])


def _laid_out(
    blocks: Sequence[Block], *, segmented: bool, ends: tuple[str, str], y: int
) -> list[_Box]:
    """Boxes from top to bottom, the first below `y`."""

    def end(name: str, about: str, *, y: int) -> _Box:
        small = f"   {about}" if about else ""
        return _Box(name, name, "", small, (), (), runs=True, is_end=True, y=y)

    boxes = [end("prologue", ends[0], y=y)]
    heads = heads_of(blocks, segmented=segmented)
    for number, (block, (op, head)) in enumerate(zip(blocks, heads, strict=True)):
        y += boxes[-1].height + _SPACE
        small = f"   KV {block.slots(block.passes[0])}" if len(block.passes) == 1 else ""
        shown = block.layers if block.passes else ()
        boxes.append(
            _Box(
                f"block{number}",
                op,
                head,
                small,
                tuple(shown[i : i + WRAP] for i in range(0, len(shown), WRAP)),
                tuple(notes_of(block)),
                runs=bool(block.passes),
                is_end=False,
                y=y,
            )
        )
    return [*boxes, end("epilogue", ends[1], y=y + boxes[-1].height + _SPACE)]


def _lines(run: Sequence[_Box], *, center: int) -> Iterator[str]:
    """From each box that runs to the next."""
    for one, two in itertools.pairwise(run):
        yield (
            f'<path class="flow" d="M{center} {one.y + one.height}V{two.y}" stroke="{LINE}" '
            'stroke-width="1.4" marker-end="url(#end)"/>'
        )


def _drawn(box: _Box, *, x: int, kinds: Sequence[str], fills: Mapping[str, str]) -> Iterator[str]:
    """The box with its text and its layers."""
    color = LINE if box.runs and not box.is_end else QUIET
    dashes = "" if box.runs else ' stroke-dasharray="4 3"'
    yield (
        f'<g class="{"end" if box.is_end else "box"}"><rect x="{x}" y="{box.y}" '
        f'width="{box.width}" height="{box.height}" rx="6" fill="{END if box.is_end else PAPER}" '
        f'stroke="{color}"{dashes}/>'
    )
    y = box.y + _PAD + 10
    head = f" {html.escape(box.head)}" if box.head else ""
    yield (
        f'<text x="{x + _PAD}" y="{y}" xml:space="preserve"><tspan font-weight="bold">{box.op}'
        f"</tspan>{head}{_quiet(box.small)}</text>"
    )
    y += 8
    for row in box.rows:
        for at, layer in enumerate(row):
            left = x + _PAD + at * (_CELL + _GAP)
            yield (
                f'<rect x="{left}" y="{y}" width="{_CELL}" height="{_CELL_HEIGHT}" '
                f'fill="{fills[kinds[layer]]}"/><text class="layer" x="{left + _CELL // 2}" '
                f'y="{y + 14}" text-anchor="middle">{layer}</text>'
            )
        y += _CELL_HEIGHT + _GAP
    for note in box.notes:
        y += 14
        yield f'<text x="{x + _PAD}" y="{y}" xml:space="preserve">{_quiet(note)}</text>'
    yield "</g>"


def _bypass(box: _Box, *, center: int) -> str:
    """The dashed way through layers that are skipped, beside the line that runs."""
    side, top, bottom = center + 34, box.y - 10, box.y + box.height + 10
    return (
        f'<path d="M{center} {top - 6}Q{side} {top - 6} {side} {box.y}M{side} {box.y + box.height}'
        f'Q{side} {bottom + 6} {center} {bottom + 6}" fill="none" stroke="{QUIET}" '
        'stroke-dasharray="4 3"/>'
    )


def _loop(box: _Box, block: Block, *, center: int) -> str:
    """From the end of a repeated box back to its beginning, with how often and the damping."""
    x = center + box.width // 2
    low, high = box.y + box.height - 8, box.y + 8
    damping = f" @{block.damping:g}" if block.damping != 1.0 else ""
    return (
        f'<path class="loop" d="M{x} {low}C{x + _LOOP} {low} {x + _LOOP} {high} {x + 1} {high}" '
        f'fill="none" stroke="{LINE}" stroke-width="1.4" marker-end="url(#end)"/>'
        f'<text x="{x + _LOOP}" y="{(low + high) // 2 + 4}">x{len(block.passes)}{damping}</text>'
    )


def _blends(
    program: Program, blocks: Sequence[Block], *, boxes: Sequence[_Box]
) -> Iterator[tuple[_Box, _Box, float]]:
    """Of each blend: the box after which the hidden state is kept, that after which it is blended
    in, and the damping.
    """
    after = {0: boxes[0]}
    for block, box in zip(blocks, boxes[1:-1], strict=True):
        if block.passes:
            after[block.passes[-1] + len(block.layers)] = box
    for blend in program.blends:
        yield after.get(blend.start, boxes[0]), after[blend.stop], blend.damping


def _blend(one: _Box, two: _Box, *, damping: float, at: int, x: int) -> str:
    """A dotted line on the left, from below the one box to below the other."""
    top, bottom = one.y + one.height + 5, two.y + two.height + 5
    return (
        f'<path class="blend" d="M{at} {top}H{x}V{bottom}H{at}" fill="none" stroke="{LINE}" '
        f'stroke-dasharray="1 3" marker-end="url(#end)"/>'
        f'<text x="{x + 3}" y="{(top + bottom) // 2}">@{damping:g}</text>'
    )


def _caption(
    title: str, legend: Mapping[str, str], *, fills: Mapping[str, str]
) -> tuple[list[str], int]:
    """Title and legend, and where the picture begins below them."""
    first, *more = title.splitlines()
    parts, y = list[str](), _MARGIN
    for line in textwrap.wrap(first, TITLE_COLUMNS):
        y += 16
        parts.append(
            f'<text x="{_MARGIN}" y="{y}" font-size="{_BIG}" font-weight="bold">'
            f"{html.escape(line)}</text>"
        )
    for line in more:
        y += 15
        parts.append(f'<text x="{_MARGIN}" y="{y}">{_quiet(line)}</text>')
    for name, text in legend.items():
        y += 18
        parts.append(
            f'<rect x="{_MARGIN}" y="{y - 11}" width="{_CELL}" height="14" fill="{fills[name]}"/>'
            f'<text x="{_MARGIN + _CELL + 8}" y="{y}" xml:space="preserve">'
            f"{_quiet(f'{name}   {text}')}</text>"
        )
    return parts, y + _MARGIN


def _quiet(text: str) -> str:
    """Small and gray, as part of a text."""
    return f'<tspan font-size="{_SMALL}" fill="{QUIET}">{html.escape(text)}</tspan>' if text else ""


def _wide(text: str, size: int) -> int:
    """About how many pixels a text takes."""
    return round(_WIDE * size * len(text))
