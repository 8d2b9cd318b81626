"""Segments to steps and back: laying out a segmentation, and finding the smallest one of a path."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ..errors import NotSegmentableError, ProgramError
from .parts import Blend, Edit, Op, Segment, check_num_steps


def segments_of_edits(edits: Iterable[Edit], depth: int) -> list[Segment]:
    """Return the segments that tile 0..depth: one per edit, keep in between.

    Raises ProgramError if an edit reaches beyond the last layer or two edits overlap.
    """
    segments: list[Segment] = []
    position = 0
    for segment in sorted((edit.to_segment() for edit in edits), key=lambda segment: segment.start):
        if segment.stop > depth:
            raise ProgramError(
                f"edit of layers {segment.start}:{segment.stop} reaches beyond layer {depth - 1}, "
                f"the last of depth {depth}; edit layers 0..{depth - 1}"
            )
        if segment.start < position:
            other = segments[-1]
            raise ProgramError(
                f"edits of layers {other.start}:{other.stop} and {segment.start}:{segment.stop} "
                "overlap; edit each layer once, or nest edits with Program.skip and "
                "Program.repeat"
            )
        if segment.start > position:
            segments.append(Segment(position, segment.start))
        segments.append(segment)
        position = segment.stop
    if position < depth:
        segments.append(Segment(position, depth))
    return segments


def check_tiling(segments: Iterable[Segment], depth: int) -> None:
    """Raise ProgramError unless the segments cover layers 0..depth-1 exactly once, in order."""
    position = 0
    for index, segment in enumerate(segments):
        if segment.start != position or segment.stop > depth:
            raise ProgramError(
                f"segment {index} covers layers {segment.start}:{segment.stop}, expected a "
                f"segment that starts at {position} and stops by {depth}; tile 0:{depth} in "
                "order, with skip for gaps"
            )
        position = segment.stop
    if position != depth:
        raise ProgramError(
            f"segments stop at layer {position} of depth {depth}; add a segment {position}:{depth}"
        )


def steps_of_segments(segments: Sequence[Segment]) -> tuple[tuple[int, ...], tuple[Blend, ...]]:
    """Return the path and blends the segments run; raise ProgramError beyond MAX_STEPS."""
    check_num_steps(sum(segment.num_steps for segment in segments), "the segments")
    path: list[int] = []
    blends: list[Blend] = []
    for segment in segments:
        for run in range(0 if segment.op is Op.SKIP else segment.times):
            if run and segment.damping < 1:
                blends.append(Blend(len(path), len(path) + segment.num_layers, segment.damping))
            path.extend(range(segment.start, segment.stop))
    return tuple(path), tuple(blends)


def minimal_segments(
    path: tuple[int, ...],
    blends: Sequence[Blend],
    *,
    depth: int,
    max_length: int | None = None,
    max_times: int | None = None,
) -> tuple[Segment, ...]:
    """Return the fewest segments that run `path` with `blends`; raise NotSegmentableError if none
    do.

    No dynamic program is needed. Segments run layers in ascending order, so all runs of one layer
    lie in one segment: how often a layer occurs tells keep from repeat, and the distance to its
    second occurrence is the repeat's length. Only where keep and skip runs are cut under
    `max_length` is open; cutting off the longest piece first is minimal, and is the tie-break (as
    in PoLar's label parser).
    """
    counts = Counter(path)
    dampings = {(blend.start, blend.stop): blend.damping for blend in blends}
    segments: list[Segment] = []
    step = layer = 0
    while step < len(path):
        first, times = path[step], counts[path[step]]
        if first < layer:
            raise NotSegmentableError(
                f"no segmentation continues at step {step}: it runs layer {first} after layer "
                f"{layer - 1}, but segments run layers in ascending order; run this path as it "
                "is, unsegmented"
            )
        segments += _pieces(layer, first, op=Op.SKIP, max_length=max_length)
        if times == 1:
            length = 1
            while (
                path[step + length : step + length + 1] == (first + length,)
                and counts[first + length] == 1
            ):
                length += 1
            segments += _pieces(first, first + length, op=Op.KEEP, max_length=max_length)
        else:
            length = path.index(first, step + 1) - step
            _check_repeat(
                path, step, length=length, times=times, max_length=max_length, max_times=max_times
            )
            damping = dampings.get((step + length, step + 2 * length), 1.0)  # of the second pass
            segments.append(Segment(first, first + length, Op.REPEAT, times, damping))
        step += length * times
        layer = first + length
    segments += _pieces(layer, depth, op=Op.SKIP, max_length=max_length)
    _check_blends(segments, dampings)
    return tuple(segments)


def _pieces(start: int, stop: int, *, op: Op, max_length: int | None) -> Iterator[Segment]:
    """Cut start..stop into segments of at most max_length layers, the longest first."""
    length = max_length or stop - start
    while start < stop:
        yield Segment(start, min(start + length, stop), op)
        start += length


def _check_repeat(
    path: tuple[int, ...],
    step: int,
    *,
    length: int,
    times: int,
    max_length: int | None,
    max_times: int | None,
) -> None:
    """Raise NotSegmentableError unless `times` runs of `length` ascending layers start at
    `step`.
    """
    first = path[step]
    layers = f"layers {first}..{first + length - 1}"
    for offset in range(length * times):
        expected, at = first + offset % length, step + offset
        if at >= len(path) or path[at] != expected:
            found = "the path ends" if at >= len(path) else f"it runs layer {path[at]}"
            raise NotSegmentableError(
                f"no segmentation continues at step {at}: layer {first} runs {times} times, so "
                f"steps from {step} would repeat {layers} and step {at} would run layer "
                f"{expected}, but {found}; run this path as it is, unsegmented"
            )
    for value, limit, name in ((length, max_length, "max_length"), (times, max_times, "max_times")):
        if limit is not None and value > limit:
            raise NotSegmentableError(
                f"no segmentation continues at step {step}: it repeats {layers} ({length} layers) "
                f"{times} times, beyond {name}={limit}, and a repeat cannot be cut; raise {name} "
                "or drop the program"
            )


def _check_blends(segments: Sequence[Segment], actual: dict[tuple[int, int], float]) -> None:
    """Raise NotSegmentableError unless the segments reproduce the blends exactly."""
    needed = {(b.start, b.stop): b.damping for b in steps_of_segments(segments)[1]}
    if needed != actual:
        start, stop = min(key for key in needed | actual if needed.get(key) != actual.get(key))
        raise NotSegmentableError(
            f"no segmentation blends steps {start}:{stop} with damping "
            f"{actual.get((start, stop), 1.0)} (segments would need "
            f"{needed.get((start, stop), 1.0)}): only a repeat is damped, in all its passes but "
            "the first, equally; run this program as it is, unsegmented"
        )
