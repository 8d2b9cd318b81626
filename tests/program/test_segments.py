"""Programs as segments, as steps and in the paper's encoding."""

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_fx.errors import NotSegmentableError, ProgramError
from polar_fx.program import Blend, Op, Program, Segment, Step

SKIP, KEEP, REPEAT = Op.SKIP, Op.KEEP, Op.REPEAT
DAMPINGS = st.sampled_from([1.0, 0.5, 0.25, 0.1, 0.3, 1e-05])


@st.composite
def segmentations(draw: st.DrawFn, max_depth: int = 12) -> tuple[list[Segment], int]:
    depth = draw(st.integers(1, max_depth))
    cuts = sorted(draw(st.sets(st.integers(1, depth)))) if depth > 1 else []
    bounds = [0, *[cut for cut in cuts if cut < depth], depth]
    segments = []
    for start, stop in itertools.pairwise(bounds):
        op = draw(st.sampled_from(Op))
        times = draw(st.integers(2, 5)) if op is REPEAT else 1
        segments.append(Segment(start, stop, op, times, draw(DAMPINGS) if op is REPEAT else 1.0))
    if all(segment.op is SKIP for segment in segments):
        segments[0] = Segment(0, segments[0].stop)
    return segments, depth


# An exact model: the hidden state is one fraction, layer i is an affine map that commutes with no
# other.


def layer_map(layer: int, h: Fraction) -> Fraction:
    return h * (layer + 2) + 1


def run_schedule(program: Program) -> Fraction:
    h, saved = Fraction(1), []
    for step in program.schedule():
        saved += [h] * step.opens
        h = layer_map(step.layer, h)
        for damping in step.closes:
            before = saved.pop()
            h = before + Fraction(damping) * (h - before)
    assert not saved
    return h


def run_segments(segments: Sequence[Segment]) -> Fraction:
    h = Fraction(1)
    for segment in segments:
        for run in range(0 if segment.op is SKIP else segment.times):
            before = h
            for layer in range(segment.start, segment.stop):
                h = layer_map(layer, h)
            h = before + Fraction(segment.damping) * (h - before) if run else h
    return h


def test_schedule_of_nested_blends() -> None:
    program = Program(3, (0, 1, 2), (Blend(0, 3, 0.5), Blend(0, 2, 0.25), Blend(1, 2, 0.125)))
    assert program.schedule() == (
        Step(0, 0, 2, ()),
        Step(1, 1, 1, (0.125, 0.25)),
        Step(2, 2, 0, (0.5,)),
    )
    # By hand: h 1 -> layer 0: 3 -> layer 1: 10, blended 3+7/8 = 31/8 -> from 1: 1+(23/8)/4 = 55/32
    # -> layer 2: 55/8+1 = 63/8 -> from 1: 1+(55/8)/2 = 71/16.
    assert run_schedule(program) == Fraction(71, 16)


# Segments


@pytest.mark.parametrize(
    ("path", "depth", "max_length", "lengths"),
    [
        (range(28), 28, 4, [4] * 7),
        # starts 0,4,5,6,10,14,...
        ([*range(5), *range(6, 28)], 28, 4, [4, 1, 1, 4, 4, 4, 4, 4, 2]),
        (range(6), 6, 4, [4, 2]),
        ([0, 7], 8, 4, [1, 4, 2, 1]),
        ([0, 1, 2, 0, 1, 2, 3], 4, 3, [3, 1]),
        ([0, 0, 1, 1], 2, None, [1, 1]),
        ([4], 9, None, [4, 1, 4]),
    ],
)
def test_segment_lengths(
    path: Sequence[int], depth: int, max_length: int | None, lengths: list[int]
) -> None:
    segments = Program.from_path(path, depth).segments(max_length)
    assert [segment.num_layers for segment in segments] == lengths


@given(segmentations(), st.sampled_from([None, 1, 2, 3, 4]))
def test_segments_round_trip(pair: tuple[list[Segment], int], max_length: int | None) -> None:
    given_segments, depth = pair
    program = Program.from_segments(given_segments, depth)
    assert run_schedule(program) == run_segments(given_segments)
    longest = max((s.num_layers for s in given_segments if s.op is REPEAT), default=0)
    if max_length is not None and longest > max_length:
        with pytest.raises(NotSegmentableError, match=f"max_length={max_length}"):
            program.segments(max_length)
        return
    segments = program.segments(max_length)
    assert Program.from_segments(segments, depth) == program
    assert run_segments(segments) == run_schedule(program)
    assert max_length is None or all(s.num_layers <= max_length for s in segments)


def all_segmentations(
    depth: int, times: range, *, dampings: Sequence[float]
) -> list[tuple[Segment, ...]]:
    ops: list[tuple[Op, int, float]] = [(SKIP, 1, 1.0), (KEEP, 1, 1.0)]
    ops += [(REPEAT, n, damping) for n in times for damping in dampings]
    found = []
    for mask in itertools.product([False, True], repeat=depth - 1):
        bounds = [0, *[i + 1 for i, cut in enumerate(mask) if cut], depth]
        pairs = list(itertools.pairwise(bounds))
        for choice in itertools.product(ops, repeat=len(pairs)):
            if any(op is not SKIP for op, _, _ in choice):
                found.append(
                    tuple(Segment(*pair, *each) for pair, each in zip(pairs, choice, strict=True))
                )
    return found


@pytest.mark.parametrize("max_length", [None, 1, 2])
@pytest.mark.parametrize("max_times", [None, 2])
def test_segments_are_minimal_by_brute_force(max_length: int | None, max_times: int | None) -> None:
    best: dict[Program, tuple[Segment, ...]] = {}

    def rank(segments: tuple[Segment, ...]) -> tuple[int, list[int]]:
        return len(segments), [-s.num_layers for s in segments]  # fewest, then longest first

    for segments in all_segmentations(4, range(2, 4), dampings=[1.0, 0.5]):
        allowed = all(
            s.num_layers <= (max_length or 4) and s.times <= (max_times or 3) for s in segments
        )
        program = Program.from_segments(segments, 4)
        if allowed and (program not in best or rank(segments) < rank(best[program])):
            best[program] = segments
    assert best
    for program, segments in best.items():
        assert program.segments(max_length, max_times) == segments


def test_not_segmentable_by_brute_force() -> None:
    expressible = {
        Program.from_segments(s, 3) for s in all_segmentations(3, range(2, 6), dampings=[1.0])
    }
    num_not = 0
    for length in range(1, 6):
        for path in itertools.product(range(3), repeat=length):
            program = Program.from_path(path, 3)
            assert program.is_segmentable == (program in expressible), program
            num_not += not program.is_segmentable
    assert num_not > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3 1 /4", "step 1: it runs layer 1 after layer 3"),
        ("0 1 0 /2", "at step 3: layer 0 runs 2 times, .* would run layer 1, but the path ends"),
        ("((0)*2 1)*2 /2", "step 2: layer 0 runs 4 times"),
        ("0 [1]@0.5 2 /3", r"blends steps 1:2 with damping 0.5 \(segments would need 1.0\)"),
        ("0 1 0 [1]@0.5 /2", "blends steps 3:4"),
        ("0 0 [0]@0.5 /1", "blends steps 2:3"),
        ("0 [0]@0.5 0 /1", r"blends steps 2:3 with damping 1.0 \(segments would need 0.5\)"),
        ("0 [0]@0.5 [0]@0.25 /1", "blends steps 2:3 with damping 0.25"),
        ("0 1 [[0]@0.5 1]@0.5 /2", "blends steps 2:3"),
    ],
)
def test_not_segmentable_says_where(text: str, message: str) -> None:
    program = Program.parse(text)
    assert not program.is_segmentable
    with pytest.raises(NotSegmentableError, match=message):
        program.segments()


def test_segment_caps() -> None:
    program = Program.parse("(0-4)*3 /6")
    assert program.segments(5, 3)[0] == Segment(0, 5, REPEAT, 3)
    with pytest.raises(NotSegmentableError, match="max_length=4"):
        program.segments(4)
    with pytest.raises(NotSegmentableError, match="max_times=2"):
        program.segments(max_times=2)
    with pytest.raises(ProgramError, match="max_length is 0"):
        program.segments(0)


# The paper's encoding


def test_encoding_by_hand() -> None:
    program = Program.from_encoding(
        [1, 0, 1, 1, 0, 1], ["keep", "?", "skip", "repeat", "skip", "keep"]
    )
    assert program.path == (0, 1, 3, 4, 3, 4, 5)
    boundaries, labels = program.encoding()
    assert boundaries == (1, 0, 1, 1, 0, 1)
    assert labels == (KEEP, KEEP, SKIP, REPEAT, REPEAT, KEEP)
    assert Program.identity(6).encoding()[0] == (1, 0, 0, 0, 1, 0)
    assert Program.identity(6).encoding(max_length=None)[0] == (1, 0, 0, 0, 0, 0)
    assert Program.from_encoding([True, False], [REPEAT, KEEP], times=3).path == (0, 1) * 3


@given(segmentations())
def test_encoding_round_trip(pair: tuple[list[Segment], int]) -> None:
    segments, depth = pair
    program = Program.from_segments(segments, depth)
    repeats = [s for s in segments if s.op is REPEAT]
    if all(s.times == 2 and s.damping == 1 and s.num_layers <= 4 for s in repeats):
        assert Program.from_encoding(*program.encoding()) == program
    else:
        with pytest.raises(NotSegmentableError):
            program.encoding()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Program.from_encoding([0, 1], [KEEP, KEEP]), r"boundaries\[0\] is 0"),
        (lambda: Program.from_encoding([1, 2], [KEEP, KEEP]), r"boundaries\[1\] is 2"),
        (
            lambda: Program.from_encoding(cast(list[int], [1, 0.0]), [KEEP, KEEP]),
            r"boundaries\[1\] is 0.0 \(float\)",
        ),  # pyright: ignore
        (lambda: Program.from_encoding([1, 0], [KEEP]), "2 boundaries but 1 labels"),
        (lambda: Program.from_encoding([], []), "depth .* is 0"),
        (
            lambda: Program.from_encoding([1, 1], ["keep", "drop"]),
            r"labels\[1\] is 'drop'; use one of skip, keep, repeat",
        ),
        (lambda: Program.from_encoding([1, 1], [SKIP, SKIP]), "empty program"),
        (lambda: Program.from_encoding([1], [KEEP], times=1), "times is 1"),
        (lambda: Program.parse("(0)*3 /1").encoding(), "max_times=2"),
        (lambda: Program.parse("(0)*2@0.5 /1").encoding(), "no damping, but layers 0:1"),
    ],
)
def test_encoding_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        build()
