"""Pictures of programs: one row of marks for a terminal, and graphviz source for everything
else.
"""

import html
import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotSegmentableError, PolarError
from ..output.files import write_whole
from ..output.plain_text import ranges
from ..program import Op, Program

_WRAP = 10  # layers a row
_TITLE_COLUMNS = 56
_MAX_PASSES = 6  # listed one by one
_FONT = "Helvetica,Arial,sans-serif"
_INK, _QUIET, _LINE, _END, _PAPER = "#1f2933", "#7b8794", "#52606d", "#e4e7eb", "#ffffff"
# by kind of layer
_FILLS = ("#bcdcf5", "#fbdcb0", "#c9e8c5", "#e3d0f0", "#f7c9c9", "#f3ecae", "#c5e8e4", "#d9d9d9")


def picture(program: Program) -> str:
    """The program's strip (`polar_fx.program.strip.LEGEND` says what the marks mean) and its share
    of the layers.

    A second line holds the text form, a third the segments if the path has any.
    """
    share = (
        f"{program.num_steps} steps, {program.num_steps / program.depth:.0%} of the "
        f"{program.depth} layers"
    )
    lines = [f"{program.strip()}   {share}", str(program)]
    try:
        segments = program.segments()
    except NotSegmentableError:
        lines.append("no sequence of skip, keep and repeat segments runs this path")
    else:
        lines.append(" | ".join(str(s) for s in segments))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- graphviz


@dataclass(frozen=True)
class _Block:
    """Layers drawn as one box, the first step of each pass over them (none: skipped), and the
    damping of further passes.
    """

    layers: tuple[int, ...]
    passes: tuple[int, ...] = ()
    damping: float = 1.0

    def slots(self, first: int) -> str:
        return ranges(range(first, first + len(self.layers)))


def program_dot(
    program: Program,
    kinds: Sequence[str],
    *,
    legend: Mapping[str, str],
    ends: tuple[str, str],
    title: str,
) -> str:
    """Graphviz source: prologue, the program's steps as boxes of layers, epilogue.

    `kinds` names the kind of each layer, which gives it its color; `legend` says more about a kind,
    `ends` about prologue and epilogue. Repeats are loops, skipped layers dashed; further lines of
    `title` are set small.
    """
    names = list(dict.fromkeys(kinds))
    fills = {name: _FILLS[i % len(_FILLS)] for i, name in enumerate(names)}
    blocks, segmented = _blocks(program)
    text = f'fontname="{_FONT}", fontsize=11, fontcolor="{_INK}"'
    lines = [
        "digraph program {",
        f'  graph [rankdir=TB, ranksep=0.3, nodesep=0.3, pad=0.25, bgcolor="{_PAPER}", '
        f'fontname="{_FONT}", labelloc=t,',
        "    labeljust=l, "
        f"label=<{_caption(title, {n: legend.get(n, '') for n in names}, fills=fills)}>];",
        f'  node [shape=box, style=rounded, margin="0.08,0.04", color="{_LINE}", {text}];',
        f'  edge [color="{_LINE}", arrowsize=0.7, penwidth=1.4, {text}];',
    ]
    for name, about in zip(("prologue", "epilogue"), ends, strict=True):
        style = f'style="rounded,filled", fillcolor="{_END}", color="{_QUIET}", margin="0.2,0.06"'
        lines.append(f"  {name} [{style}, label=<<b>{name}</b>{_small(about and '   ' + about)}>];")
    met: set[int] = set()
    for i, block in enumerate(blocks):
        op = (
            "skip"
            if not block.passes
            else "repeat"
            if len(block.passes) > 1
            else "keep"
            if segmented
            else "run"
        )
        head = f"<b>{op}</b> {ranges(block.layers)}{' again' if met & set(block.layers) else ''}"
        met |= set(block.layers)
        style = "" if block.passes else f'style="rounded,dashed", color="{_QUIET}", '
        lines.append(f"  block{i} [{style}label=<{_box(block, head, kinds=kinds, fills=fills)}>];")
    lines += _edges(blocks)
    if not segmented:
        lines += _residuals(program, blocks)
    return "\n".join([*lines, "}", ""])


def render_svg(source: str, path: str | os.PathLike[str]) -> Path:
    """Write graphviz source as an SVG picture.

    Raises PolarError without graphviz, InputError if it cannot be written.
    """
    dot = find_dot()
    try:
        made = subprocess.run(
            [dot, "-Tsvg"], input=source.encode(), capture_output=True, check=True, timeout=120
        ).stdout
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        raise PolarError(
            f"graphviz failed ({said.decode(errors='replace').strip()}); .dot() gives the source"
        ) from error
    return write_whole(made, path)


def find_dot() -> str:
    """The graphviz program. Raises PolarError naming the remedy."""
    found = shutil.which("dot")
    if found is None:
        raise PolarError(
            "drawing needs graphviz, and there is no `dot` to run; install it (apt install "
            "graphviz, brew install graphviz), or take the source from .dot()"
        )
    return found


def _blocks(program: Program) -> tuple[list[_Block], bool]:
    """The boxes in order, and whether they are the program's segments."""
    try:
        segments = program.segments()
    except NotSegmentableError:
        return list(_runs(program)), False
    blocks, step = [], 0
    for segment in segments:
        layers = tuple(range(segment.start, segment.stop))
        times = 0 if segment.op is Op.SKIP else segment.times
        blocks.append(
            _Block(layers, tuple(step + i * len(layers) for i in range(times)), segment.damping)
        )
        step += times * len(layers)
    return blocks, True


def _runs(program: Program) -> Iterator[_Block]:
    """Steps over ascending layers, cut where blends begin and end; layers that never run stand
    where they are jumped over.
    """
    path, cuts = program.path, {at for b in program.blends for at in (b.start, b.stop)}
    left = set(range(program.depth)) - set(path)

    def jumped(after: int, before: int) -> Iterator[_Block]:
        found = tuple(sorted(layer for layer in left if after < layer < before))
        left.difference_update(found)
        if found:
            yield _Block(found)

    start, previous = 0, -1
    while start < len(path):
        stop = start + 1
        while stop < len(path) and path[stop] == path[stop - 1] + 1 and stop not in cuts:
            stop += 1
        passes, layers = [start], path[start:stop]
        while path[stop : stop + len(layers)] == layers and cuts.isdisjoint(
            range(stop, stop + len(layers))
        ):
            passes.append(stop)
            stop += len(layers)
        yield from jumped(previous, path[start])
        yield _Block(layers, tuple(passes))
        start, previous = stop, path[stop - 1]
    yield from jumped(previous, program.depth)


def _edges(blocks: Sequence[_Block]) -> Iterator[str]:
    previous, skipped = "prologue", ""
    for i, block in enumerate([*blocks, None]):
        name = "epilogue" if block is None else f"block{i}"
        if block is not None and not block.passes:
            skipped = name
            continue
        yield f"  {previous} -> {name} [weight=8];"
        if skipped:
            ghost = f'style=dashed, color="{_QUIET}", arrowhead=none, penwidth=1'
            yield f"  {previous} -> {skipped} [{ghost}];"
            yield f"  {skipped} -> {name} [{ghost}];"
        if block is not None and len(block.passes) > 1:
            damping = f" @{block.damping:g}" if block.damping != 1.0 else ""
            yield f'  {name}:e -> {name}:e [label=" x{len(block.passes)}{damping}"];'
        previous, skipped = name, ""


def _residuals(program: Program, blocks: Sequence[_Block]) -> Iterator[str]:
    """From where a blend saves the hidden state to the box behind which it is blended in."""
    ends = {b.passes[-1] + len(b.layers): f"block{i}" for i, b in enumerate(blocks) if b.passes}
    for blend in program.blends:
        style = f'style=dotted, constraint=false, label=" @{blend.damping:g}"'
        yield f"  {ends.get(blend.start, 'prologue')} -> {ends[blend.stop]} [{style}];"


def _box(block: _Block, head: str, *, kinds: Sequence[str], fills: Mapping[str, str]) -> str:
    """What happens, the layers colored by kind, and a line a pass with its KV slots."""
    notes = [f"pass {i + 1}   KV {block.slots(first)}" for i, first in enumerate(block.passes)]
    if len(notes) == 1:
        head += _small(f"   KV {block.slots(block.passes[0])}")
    rows = [head]
    if notes:
        cells = [
            f'<td width="26" height="20" bgcolor="{fills[kinds[layer]]}">{layer}</td>'
            for layer in block.layers
        ]
        rows.append(_table(["".join(cells[i : i + _WRAP]) for i in range(0, len(cells), _WRAP)], 2))
    if len(notes) > _MAX_PASSES:
        notes[_MAX_PASSES - 1 : -1] = ["..."]
    rows += map(_small, notes if len(notes) > 1 else [])
    return _table([f'<td align="left">{row}</td>' for row in rows], 0)


def _caption(title: str, legend: Mapping[str, str], *, fills: Mapping[str, str]) -> str:
    first, *more = title.splitlines()
    lines = [
        f'<font point-size="14"><b>{html.escape(line)}</b></font>'
        for line in textwrap.wrap(first, _TITLE_COLUMNS)
    ]
    rows = [f'<td colspan="2" align="left">{line}</td>' for line in (*lines, *map(_small, more))]
    for name, text in legend.items():
        square = f'<td width="26" height="14" fixedsize="true" bgcolor="{fills[name]}"></td>'
        rows.append(f'{square}<td align="left">{_small(f"{name}   {text}")}</td>')
    return _table(rows, 3)


def _table(rows: Iterable[str], spacing: int) -> str:
    cells = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table border="0" cellborder="0" cellspacing="{spacing}">{cells}</table>'


def _small(text: str) -> str:
    """Quiet text; runs of spaces are kept."""
    if not text:
        return ""
    return (
        '<font point-size="10" '
        f'color="{_QUIET}">{html.escape(text).replace("  ", "&#160;&#160;")}</font>'
    )
