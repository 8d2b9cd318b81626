"""What pictures of a program have in common: its steps as boxes of layers, and colors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import NotSegmentableError
from ..output.plain_text import ranges
from ..program import Op, Program

WRAP = 10  # layers a row
TITLE_COLUMNS = 56
FONT = "Helvetica,Arial,sans-serif"
INK, QUIET, LINE, END, PAPER = "#1f2933", "#7b8794", "#52606d", "#e4e7eb", "#ffffff"

_MAX_PASSES = 6  # listed one by one
# by kind of layer
_FILLS = ("#bcdcf5", "#fbdcb0", "#c9e8c5", "#e3d0f0", "#f7c9c9", "#f3ecae", "#c5e8e4", "#d9d9d9")


def fills_of(names: Sequence[str]) -> dict[str, str]:
    """The color of each kind of layer."""
    return {name: _FILLS[i % len(_FILLS)] for i, name in enumerate(names)}


@dataclass(frozen=True)
class Block:
    """Layers drawn as one box, the first step of each pass over them (none: skipped), and the
    damping of further passes.
    """

    layers: tuple[int, ...]
    passes: tuple[int, ...] = ()
    damping: float = 1.0

    def slots(self, first: int) -> str:
        return ranges(range(first, first + len(self.layers)))


def heads_of(blocks: Sequence[Block], *, segmented: bool) -> Iterator[tuple[str, str]]:
    """What each box does, and with which layers."""
    met: set[int] = set()
    for block in blocks:
        op = (
            "skip"
            if not block.passes
            else "repeat"
            if len(block.passes) > 1
            else "keep"
            if segmented
            else "run"
        )
        yield op, f"{ranges(block.layers)}{' again' if met & set(block.layers) else ''}"
        met |= set(block.layers)


def notes_of(block: Block) -> list[str]:
    """A line a pass with its KV slots, where there are several; many are cut short."""
    if len(block.passes) < 2:
        return []
    notes = [f"pass {i + 1}   KV {block.slots(first)}" for i, first in enumerate(block.passes)]
    if len(notes) > _MAX_PASSES:
        notes[_MAX_PASSES - 1 : -1] = ["..."]
    return notes


def blocks_of(program: Program) -> tuple[list[Block], bool]:
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
            Block(layers, tuple(step + i * len(layers) for i in range(times)), segment.damping)
        )
        step += times * len(layers)
    return blocks, True


def _runs(program: Program) -> Iterator[Block]:
    """Steps over ascending layers, cut where blends begin and end; layers that never run stand
    where they are jumped over.
    """
    path, cuts = program.path, {at for b in program.blends for at in (b.start, b.stop)}
    left = set(range(program.depth)) - set(path)

    def jumped(after: int, before: int) -> Iterator[Block]:
        found = tuple(sorted(layer for layer in left if after < layer < before))
        left.difference_update(found)
        if found:
            yield Block(found)

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
        yield Block(layers, tuple(passes))
        start, previous = stop, path[stop - 1]
    yield from jumped(previous, program.depth)
