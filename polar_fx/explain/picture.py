"""Pictures of programs: one row of marks for a terminal, and graphviz source for everything
else.
"""

import html
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import NotSegmentableError
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
    fills = fills_of(names)
    blocks, segmented = blocks_of(program)
    text = f'fontname="{FONT}", fontsize=11, fontcolor="{INK}"'
    lines = [
        "digraph program {",
        f'  graph [rankdir=TB, ranksep=0.3, nodesep=0.3, pad=0.25, bgcolor="{PAPER}", '
        f'fontname="{FONT}", labelloc=t,',
        "    labeljust=l, "
        f"label=<{_caption(title, {n: legend.get(n, '') for n in names}, fills=fills)}>];",
        f'  node [shape=box, style=rounded, margin="0.08,0.04", color="{LINE}", {text}];',
        f'  edge [color="{LINE}", arrowsize=0.7, penwidth=1.4, {text}];',
    ]
    for name, about in zip(("prologue", "epilogue"), ends, strict=True):
        style = f'style="rounded,filled", fillcolor="{END}", color="{QUIET}", margin="0.2,0.06"'
        lines.append(f"  {name} [{style}, label=<<b>{name}</b>{_small(about and '   ' + about)}>];")
    for i, (block, (op, rest)) in enumerate(
        zip(blocks, heads_of(blocks, segmented=segmented), strict=True)
    ):
        head = f"<b>{op}</b> {rest}"
        style = "" if block.passes else f'style="rounded,dashed", color="{QUIET}", '
        lines.append(f"  block{i} [{style}label=<{_box(block, head, kinds=kinds, fills=fills)}>];")
    lines += _edges(blocks)
    if not segmented:
        lines += _residuals(program, blocks)
    return "\n".join([*lines, "}", ""])


def _edges(blocks: Sequence[Block]) -> Iterator[str]:
    previous, skipped = "prologue", ""
    for i, block in enumerate([*blocks, None]):
        name = "epilogue" if block is None else f"block{i}"
        if block is not None and not block.passes:
            skipped = name
            continue
        yield f"  {previous} -> {name} [weight=8];"
        if skipped:
            ghost = f'style=dashed, color="{QUIET}", arrowhead=none, penwidth=1'
            yield f"  {previous} -> {skipped} [{ghost}];"
            yield f"  {skipped} -> {name} [{ghost}];"
        if block is not None and len(block.passes) > 1:
            damping = f" @{block.damping:g}" if block.damping != 1.0 else ""
            yield f'  {name}:e -> {name}:e [label=" x{len(block.passes)}{damping}"];'
        previous, skipped = name, ""


def _residuals(program: Program, blocks: Sequence[Block]) -> Iterator[str]:
    """From where a blend saves the hidden state to the box behind which it is blended in."""
    ends = {b.passes[-1] + len(b.layers): f"block{i}" for i, b in enumerate(blocks) if b.passes}
    for blend in program.blends:
        style = f'style=dotted, constraint=false, label=" @{blend.damping:g}"'
        yield f"  {ends.get(blend.start, 'prologue')} -> {ends[blend.stop]} [{style}];"


def _box(block: Block, head: str, *, kinds: Sequence[str], fills: Mapping[str, str]) -> str:
    """What happens, the layers colored by kind, and a line a pass with its KV slots."""
    if len(block.passes) == 1:
        head += _small(f"   KV {block.slots(block.passes[0])}")
    rows = [head]
    if block.passes:
        cells = [
            f'<td width="26" height="20" bgcolor="{fills[kinds[layer]]}">{layer}</td>'
            for layer in block.layers
        ]
        rows.append(_table(["".join(cells[i : i + WRAP]) for i in range(0, len(cells), WRAP)], 2))
    rows += map(_small, notes_of(block))
    return _table([f'<td align="left">{row}</td>' for row in rows], 0)


def _caption(title: str, legend: Mapping[str, str], *, fills: Mapping[str, str]) -> str:
    first, *more = title.splitlines()
    lines = [
        f'<font point-size="14"><b>{html.escape(line)}</b></font>'
        for line in textwrap.wrap(first, TITLE_COLUMNS)
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
        f'color="{QUIET}">{html.escape(text).replace("  ", "&#160;&#160;")}</font>'
    )
