"""Programs: which layers of a frozen transformer run, in which order.

A program (PoLar, arXiv 2606.06574) is a path of layer numbers over a model of `depth` layers, run
between the embedding and the final norm. This module needs the standard library only.

    >>> from polar_fx.program import Edit, Op, Program
    >>> program = Program.from_edits([Edit(5, 1, Op.SKIP), Edit(10, 2, Op.REPEAT)], depth=30)
    >>> program
    Program('0-4 6-9 (10-11)*2 12-29 /30')
    >>> program == Program.parse("skip 5, repeat 10-11", depth=30)
    True
"""

# Callers who run no type checker are told what is wrong.
# pyright: reportUnnecessaryIsInstance=false

import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import NotSegmentableError, ProgramError
from .parts import (
    MAX_STEPS,
    Blend,
    Edit,
    Op,
    Segment,
    Step,
    canonical_blends,
    check_damping,
    check_depth,
    check_num_steps,
    check_op,
    check_whole,
)
from .segments import check_tiling, minimal_segments, segments_of_edits, steps_of_segments
from .strip import Strip
from .text import format_text, parse_text

__all__ = ["MAX_STEPS", "Blend", "Edit", "Op", "Program", "Segment", "Step"]

_FINGERPRINT_VERSION = 1  # raise it when the fingerprinted fields or their meaning change


@dataclass(frozen=True, slots=True, repr=False)
class Program:
    """An immutable, hashable path over `depth` layers; equal programs run the same computation.

    `path` holds layer numbers in execution order and `blends` the damped stretches of it, in
    canonical
    form: outer before inner, one per interval, no-ops dropped. Raises ProgramError if the path is
    empty, longer than MAX_STEPS or leaves layers 0..depth-1, or if blends overlap without nesting.
    """

    depth: int
    path: tuple[int, ...]
    blends: tuple[Blend, ...] = ()

    def __post_init__(self) -> None:
        depth = check_depth(self.depth)
        path = tuple(self.path)
        if not path:
            raise ProgramError(f"empty program of depth {depth}; keep at least one layer")
        check_num_steps(len(path), "the path")
        path = tuple(
            check_whole(layer, f"path[{i}]", low=0, high=depth - 1) for i, layer in enumerate(path)
        )
        object.__setattr__(self, "depth", depth)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "blends", canonical_blends(self.blends, len(path)))

    # Construction

    @classmethod
    def identity(cls, depth: int) -> "Program":
        """Return the standard forward pass, layers 0..depth-1.

        Raises ProgramError on a bad depth.
        """
        depth = check_depth(depth)
        return cls(depth, tuple(range(depth)))

    @classmethod
    def from_path(cls, path: Iterable[int], depth: int) -> "Program":
        """Return the program that runs the layers of `path` in order.

        Raises ProgramError if the path is empty, too long, or holds anything but layers 0..depth-1.
        """
        try:
            return cls(depth, tuple(path))
        except TypeError:
            raise ProgramError(
                f"path is {path!r} ({type(path).__name__}); give the numbers of layers, or a text "
                "such as 'skip 5'"
            ) from None

    @classmethod
    def from_segments(cls, segments: Iterable[Segment], depth: int) -> "Program":
        """Return the program that runs `segments`, PoLar's predictable form.

        Raises ProgramError unless they tile 0..depth exactly, in order, and run 1..MAX_STEPS steps.
        """
        depth = check_depth(depth)
        segments = tuple(segments)
        check_tiling(segments, depth)
        return cls(depth, *steps_of_segments(segments))

    @classmethod
    def from_encoding(
        cls, boundaries: Sequence[int], labels: Sequence[Op | str], times: int = 2
    ) -> "Program":
        """Return the program of PoLar's predictor output: boundary mask z_seg and op labels z_op.

        Both have one entry a layer; boundaries[i] = 1 starts a segment at layer i, and labels are
        read only there. Repeats run `times` times. Raises ProgramError if the lengths differ, layer
        0 starts no segment, a mask entry is not 0 or 1, a label that is read is unknown, or all is
        skipped.
        """
        depth = check_depth(len(boundaries))
        times = check_whole(times, "times", low=2)
        if len(labels) != depth:
            raise ProgramError(
                f"{depth} boundaries but {len(labels)} labels; give one of each a layer"
            )
        # A mask may well be bools, so int() them first; only layer numbers must not be.
        mask = [int(bit) if isinstance(bit, bool) else bit for bit in boundaries]
        starts = [
            i for i, bit in enumerate(mask) if check_whole(bit, f"boundaries[{i}]", low=0, high=1)
        ]
        if not mask[0]:
            raise ProgramError(
                "boundaries[0] is 0, but the first segment starts at layer 0; set it to 1"
            )
        segments: list[Segment] = []
        for start, stop in zip(starts, [*starts[1:], depth], strict=True):
            op = check_op(labels[start], f"labels[{start}]")
            segments.append(Segment(start, stop, op, times if op is Op.REPEAT else 1))
        return cls.from_segments(segments, depth)

    @classmethod
    def from_edits(cls, edits: Iterable[Edit], depth: int) -> "Program":
        """Return the identity with `edits` made in it, in any order, in original layer numbers.

        Raises ProgramError if edits overlap, leave the depth, or skip every layer.
        """
        depth = check_depth(depth)
        return cls.from_segments(segments_of_edits(edits, depth), depth)

    @classmethod
    def parse(cls, text: str, depth: int | None = None) -> "Program":
        """Return the program written as `text`; the inverse of str().

        Items are layers `5`, ranges `0-4` (both ends included), groups `(10-11)*2` or damped
        `(10-11)*3@0.5`, and single damped passes `[10-11]@0.5`, then `/30` for the depth unless
        `depth` gives it. Also read: `identity`, and edits such as `skip 3-5, repeat 10-11 x3 @0.5`.
        Raises ProgramTextError with the position of a mistake, ProgramError for edits that overlap
        or skip every layer.
        """
        if not isinstance(text, str):
            raise ProgramError(
                f"text is {text!r} ({type(text).__name__}); give a str, or use from_path"
            )
        return cls(*parse_text(text, None if depth is None else check_depth(depth)))

    # Nested edits, on positions of the current path (PoLar App. B.3: actions modify the current
    # program)

    def skip(self, start: int, length: int = 1) -> "Program":
        """Return the program without steps start..start+length-1.

        Blends around them shrink, and go when nothing is left. Raises ProgramError if the steps do
        not exist, are all there are, or cut a blend in two.
        """
        start, stop = self._block(start, length)
        if stop - start == self.num_steps:
            raise ProgramError(
                f"skip of steps {start}:{stop} leaves an empty program; keep at least one step"
            )
        kept = [
            Blend(
                b.start - _overlap(b.start, start, stop=stop),
                b.stop - _overlap(b.stop, start, stop=stop),
                b.damping,
            )
            for b in self.blends
            if not start <= b.start < b.stop <= stop
        ]
        return Program(self.depth, self.path[:start] + self.path[stop:], tuple(kept))

    def repeat(
        self, start: int, length: int = 1, times: int = 2, damping: float = 1.0
    ) -> "Program":
        """Return the program that runs steps start..start+length-1 `times` times in a row, in
        place.

        Every run but the first is blended in with `damping`. Blends on or inside the steps are
        copied with them, blends around them grow. Raises ProgramError if the steps do not exist or
        cut a blend in two, for times < 2, a damping outside (0, 1], and beyond MAX_STEPS steps.
        """
        start, stop = self._block(start, length)
        size, times = stop - start, check_whole(times, "times", low=2)
        damping = check_damping(damping, f"the repeat of steps {start}:{stop}")
        added = size * (times - 1)
        check_num_steps(self.num_steps + added, f"repeat of steps {start}:{stop}")
        blends = [Blend(start + run * size, stop + run * size, damping) for run in range(1, times)]
        for b in self.blends:
            if start <= b.start and b.stop <= stop:
                shifts = range(0, size * times, size)
                blends += [
                    replace(b, start=b.start + shift, stop=b.stop + shift) for shift in shifts
                ]
            else:
                after_start, after_stop = added * (b.start >= stop), added * (b.stop >= stop)
                blends.append(replace(b, start=b.start + after_start, stop=b.stop + after_stop))
        path = self.path[:stop] + self.path[start:stop] * (times - 1) + self.path[stop:]
        return Program(self.depth, path, tuple(blends))

    def _block(self, start: int, length: int) -> tuple[int, int]:
        """Return the checked (start, stop) of a block of steps."""
        start = check_whole(start, "start (a step)", low=0, high=self.num_steps - 1)
        stop = start + check_whole(
            length, f"length of the block at step {start}", low=1, high=self.num_steps - start
        )
        for b in self.blends:
            if start < b.start < stop < b.stop or b.start < start < b.stop < stop:
                raise ProgramError(
                    f"block of steps {start}:{stop} cuts the blend over steps {b.start}:{b.stop} "
                    "in two; edit steps within it, or all of it"
                )
        return start, stop

    # Inspection

    @property
    def num_steps(self) -> int:
        """Number of executed layers."""
        return len(self.path)

    @property
    def unique_layers(self) -> tuple[int, ...]:
        """The layers that run at all, ascending."""
        return tuple(sorted(set(self.path)))

    @property
    def num_unique_layers(self) -> int:
        """Number of layers that run at all."""
        return len(set(self.path))

    @property
    def is_identity(self) -> bool:
        """Whether this is the standard forward pass."""
        return not self.blends and self.path == tuple(range(self.depth))

    @property
    def is_monotone(self) -> bool:
        """Whether the path never goes back to an earlier layer (running one layer again is
        allowed).
        """
        return all(
            earlier <= later for earlier, later in zip(self.path, self.path[1:], strict=False)
        )

    @property
    def words(self) -> str:
        """The program as people write it: `identity`, or what is done to it, `skip 5, repeat 10-11
        x2`; the canonical text where no such edits make it. `parse` reads it, given the depth.
        """
        try:
            segments = self.segments()
        except NotSegmentableError:
            return str(self)
        edits = [str(segment) for segment in segments if segment.op is not Op.KEEP]
        return ", ".join(edits) or "identity"

    @property
    def fingerprint(self) -> str:
        """32 hex digits that name this program, the same in every process and version."""
        blends = [[b.start, b.stop, b.damping] for b in self.blends]
        fields = {
            "version": _FINGERPRINT_VERSION,
            "depth": self.depth,
            "path": self.path,
            "blends": blends,
        }
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def segments(
        self, max_length: int | None = None, max_times: int | None = None
    ) -> tuple[Segment, ...]:
        """Return the fewest segments that run exactly this path and these blends.

        `max_length` caps the layers of a segment (4 in PoLar's predictor), `max_times` the runs of
        a repeat. Ties, which only the cap makes, go to longer segments first. Raises
        NotSegmentableError, naming the step, if no segments do it: 0,1,2,3,2,4,5 has none.
        """
        max_length = None if max_length is None else check_whole(max_length, "max_length", low=1)
        max_times = None if max_times is None else check_whole(max_times, "max_times", low=1)
        return minimal_segments(
            self.path, self.blends, depth=self.depth, max_length=max_length, max_times=max_times
        )

    @property
    def is_segmentable(self) -> bool:
        """Whether `segments()` exist."""
        try:
            self.segments()
        except NotSegmentableError:
            return False
        return True

    def encoding(self, max_length: int | None = 4) -> tuple[tuple[int, ...], tuple[Op, ...]]:
        """Return PoLar's (z_seg, z_op): boundary mask and op of each layer; inverse of
        `from_encoding`.

        Raises NotSegmentableError if the program has no segments of at most `max_length` layers, or
        repeats more than twice or damped, which the paper's encoding cannot say.
        """
        boundaries: list[int] = []
        labels: list[Op] = []
        for segment in self.segments(max_length, max_times=2):
            if segment.damping < 1:
                raise NotSegmentableError(
                    f"the encoding has no damping, but layers {segment.start}:{segment.stop} "
                    f"repeat with {segment.damping}; keep the segments instead, or repeat undamped"
                )
            boundaries += [1] + [0] * (segment.num_layers - 1)
            labels += [segment.op] * segment.num_layers
        return tuple(boundaries), tuple(labels)

    def schedule(self) -> tuple[Step, ...]:
        """Return the path with the blends to open before and close after each step, for a
        compiler.
        """
        opens = [0] * self.num_steps
        closes: list[list[float]] = [[] for _ in self.path]
        for blend in reversed(self.blends):  # inner blends first
            opens[blend.start] += 1
            closes[blend.stop - 1].append(blend.damping)
        return tuple(
            Step(index, layer, opens[index], tuple(closes[index]))
            for index, layer in enumerate(self.path)
        )

    def strip(self) -> Strip:
        """Return the program as a row of cells, one a layer, for `.text()` and `.svg()`."""
        return Strip.of(self.depth, self.path, blends=self.blends)

    def __str__(self) -> str:
        """The canonical text, `0-4 6-29 /30`; `parse` reads it back exactly."""
        return format_text(self.schedule(), self.depth)

    def __repr__(self) -> str:
        return f"Program({str(self)!r})"

    def _repr_html_(self) -> str:
        """The strip above the text, as notebooks show it."""
        share = f"{self.num_steps} steps, {self.num_steps / self.depth:.0%} of the layers"
        return (
            f"<div>{self.strip().svg()}<br><code>{html.escape(str(self))}</code> "
            f"<small>{share}</small></div>"
        )


def _overlap(bound: int, start: int, *, stop: int) -> int:
    """Return how many of the steps start..stop-1 lie before step `bound`."""
    return min(max(bound - start, 0), stop - start)
