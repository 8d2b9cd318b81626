"""Programs by hand: construction, canonical form, nested edits, bad values, fingerprint,
imports.
"""

import copy
import hashlib
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import cast

import pytest

from polar_fx.errors import NotSegmentableError, PolarError, ProgramError
from polar_fx.program import MAX_STEPS, Blend, Edit, Op, Program, Segment

SKIP, KEEP, REPEAT = Op.SKIP, Op.KEEP, Op.REPEAT


def test_identity() -> None:
    program = Program.identity(4)
    assert program == Program.from_path([0, 1, 2, 3], 4) == Program(4, (0, 1, 2, 3))
    assert program.is_identity and program.is_monotone and program.is_segmentable
    assert (program.num_steps, program.unique_layers, program.num_unique_layers) == (
        4,
        (0, 1, 2, 3),
        4,
    )
    assert program.segments() == (Segment(0, 4),)
    assert str(program) == "0-3 /4"
    assert repr(program) == "Program('0-3 /4')"


def test_skip_one() -> None:
    program = Program.identity(30).skip(5)
    assert program.path == (*range(5), *range(6, 30))
    assert program.segments() == (Segment(0, 5), Segment(5, 6, SKIP), Segment(6, 30))
    assert not program.is_identity and program.is_monotone
    assert repr(program) == "Program('0-4 6-29 /30')"


def test_skip_first_and_last_layer() -> None:
    program = Program.from_path([1, 2], 5)
    assert program.segments() == (Segment(0, 1, SKIP), Segment(1, 3), Segment(3, 5, SKIP))
    assert str(program) == "1-2 /5"
    assert program.unique_layers == (1, 2)


def test_repeat_twice() -> None:
    program = Program.identity(6).repeat(2, 2)
    assert program.path == (0, 1, 2, 3, 2, 3, 4, 5)
    assert program.segments() == (Segment(0, 2), Segment(2, 4, REPEAT, 2), Segment(4, 6))
    assert str(program) == "0-1 (2-3)*2 4-5 /6"
    assert not program.is_monotone and Program.identity(6).repeat(2).is_monotone


def test_repeat_three_times_damped() -> None:
    program = Program.identity(4).repeat(1, 2, times=3, damping=0.5)
    assert program.path == (0, 1, 2, 1, 2, 1, 2, 3)
    assert program.blends == (Blend(3, 5, 0.5), Blend(5, 7, 0.5))
    assert program.segments() == (Segment(0, 1), Segment(1, 3, REPEAT, 3, 0.5), Segment(3, 4))
    assert str(program) == "0 (1-2)*3@0.5 3 /4"
    assert [(step.opens, step.closes) for step in program.schedule()] == [
        (0, ()),
        (0, ()),
        (0, ()),
        (1, ()),
        (0, (0.5,)),
        (1, ()),
        (0, (0.5,)),
        (0, ()),
    ]
    assert program == Program.from_edits([Edit(1, 2, REPEAT, 3, 0.5)], 4)


def test_nested_edits_leave_the_segments() -> None:
    program = Program.identity(6).repeat(2, 2).skip(5)
    assert program.path == (0, 1, 2, 3, 2, 4, 5)
    assert not program.is_segmentable
    with pytest.raises(
        NotSegmentableError, match=r"at step 5: .* would run layer 3, but it runs layer 4"
    ):
        program.segments()
    assert str(program) == "0-3 2 4-5 /6"


# Canonical form


def test_blends_are_canonical() -> None:
    blends = [
        Blend(1, 2, 0.5),
        Blend(0, 2, 1.0),
        Blend(0, 1, 0.5),
        Blend(0, 3, 0.25),
        Blend(1, 2, 0.5),
        Blend(0, 3, 1),
    ]
    program = Program(3, (0, 1, 2), tuple(blends))
    assert program.blends == (Blend(0, 3, 0.25), Blend(0, 1, 0.5), Blend(1, 2, 0.25))
    for order in itertools.permutations(blends):
        assert Program(3, (0, 1, 2), order) == program
    assert hash(program) == hash(Program(3, (0, 1, 2), program.blends))


def test_merging_is_independent_of_order() -> None:
    blends = [Blend(0, 1, damping) for damping in (0.1, 0.2, 0.3, 0.7)]
    assert len({Program(1, (0,), order) for order in itertools.permutations(blends)}) == 1


def test_values_are_immutable_and_copy() -> None:
    program = Program.parse("0 (1-2)*3@0.5 3 /4")
    with pytest.raises(AttributeError):
        program.depth = 5  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(program)) == copy.deepcopy(program) == program
    assert {program: 1}[Program.parse(str(program))] == 1
    assert isinstance(Program.from_path([True + 0], 2).path, tuple)


def test_edits_in_any_order_are_one_program() -> None:
    edits = [Edit(0, 1, SKIP), Edit(2, 2, REPEAT, 3), Edit(4, 1, REPEAT, damping=0.5)]
    programs = {Program.from_edits(order, 6) for order in itertools.permutations(edits)}
    assert {str(program) for program in programs} == {"1 (2-3)*3 (4)*2@0.5 5 /6"}
    assert len(programs) == 1
    assert Program.from_edits([], 6) == Program.identity(6)
    assert Program.from_edits([Edit(1, 1, SKIP), Edit(2, 1, SKIP)], 4) == Program.from_edits(
        [Edit(1, 2, SKIP)], 4
    )


@pytest.mark.parametrize(
    "other", ["0-3 /5", "0-2 /4", "0-1 3 2 /4", "0-2 [3]@0.5 /4", "(0)*2 1-3 /4"]
)
def test_different_programs_differ(other: str) -> None:
    program = Program.identity(4)
    assert Program.parse(other) != program
    assert Program.parse(other).fingerprint != program.fingerprint
    assert str(Program.parse(other)) != str(program)


# Nested edits and blends


def test_edits_inside_and_around_a_blend() -> None:
    program = Program(5, (0, 1, 2, 3, 4), (Blend(1, 4, 0.5),))
    assert program.repeat(2).blends == (Blend(1, 5, 0.5),)  # grows
    # also at its ends
    assert program.repeat(1).blends == program.repeat(3).blends == (Blend(1, 5, 0.5),)
    assert program.skip(2).blends == program.skip(3).blends == (Blend(1, 3, 0.5),)  # shrinks
    assert program.skip(0).blends == (Blend(0, 3, 0.5),)  # moves
    assert program.repeat(0, times=3).blends == (Blend(3, 6, 0.5),)
    assert program.repeat(4).blends == program.skip(4).blends == program.blends  # behind it
    assert program.skip(1, 3) == Program.from_path([0, 4], 5)  # vanishes
    assert program.repeat(1, 3).blends == (Blend(1, 4, 0.5), Blend(4, 7, 0.5))  # on it: copied
    assert program.repeat(0, 5).blends == (Blend(1, 4, 0.5), Blend(6, 9, 0.5))  # inside: copied
    assert program.repeat(1, 3, damping=0.5).blends == (Blend(1, 4, 0.5), Blend(4, 7, 0.25))
    assert program.repeat(2, damping=0.25).blends == (Blend(1, 5, 0.5), Blend(3, 4, 0.25))
    shrunk = Program(3, (0, 1, 2), (Blend(0, 3, 0.5), Blend(0, 2, 0.5))).skip(2)
    assert shrunk.blends == (Blend(0, 2, 0.25),)


@pytest.mark.parametrize(("start", "length"), [(0, 2), (3, 2), (0, 3), (2, 3)])
def test_a_block_may_not_cut_a_blend(start: int, length: int) -> None:
    program = Program(5, (0, 1, 2, 3, 4), (Blend(1, 4, 0.5),))
    for edit in (program.skip, program.repeat):
        with pytest.raises(
            ProgramError, match=rf"steps {start}:{start + length} cuts the blend over steps 1:4"
        ):
            edit(start, length)


# Bad values


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Program.from_path([], 3), "empty program of depth 3"),
        (lambda: Program.from_path([0, 3], 3), r"path\[1\] is 3; give a whole number from 0 to 2"),
        (lambda: Program.from_path([-1], 3), r"path\[0\] is -1"),
        (lambda: Program.from_path([True], 3), r"path\[0\] is True \(bool\)"),
        (lambda: Program.from_path([1.0], 3), r"path\[0\] is 1.0 \(float\)"),  # pyright: ignore
        (lambda: Program.from_path("01", 3), r"path\[0\] is '0' \(str\)"),  # pyright: ignore
        (lambda: Program.from_path([0], 0), "depth .* is 0"),
        (lambda: Program.from_path([0], 2.0), r"depth .* is 2.0 \(float\)"),  # pyright: ignore
        (lambda: Program.identity(MAX_STEPS + 1), f"depth .* is {MAX_STEPS + 1}"),
        (
            lambda: Program.from_path([0] * (MAX_STEPS + 1), 1),
            f"{MAX_STEPS + 1} steps, the limit is {MAX_STEPS}",
        ),
        (lambda: Program.identity(3).repeat(0, 3, 10**12), "the limit is"),
        (lambda: Program.from_segments([Segment(0, 1, REPEAT, 10**12)], 1), "the limit is"),
        (lambda: Program.identity(3).repeat(0, times=1), "times is 1"),
        (lambda: Program.identity(3).repeat(0, damping=0), "damping .* is 0"),
        (lambda: Program.identity(3).repeat(0, damping=float("nan")), "damping .* is nan"),
        (lambda: Program.identity(3).repeat(0, damping=True), "damping .* is True"),
        (lambda: Program.identity(3).repeat(3), "start .* is 3; give a whole number from 0 to 2"),
        (lambda: Program.identity(3).skip(1, 3), "length of the block at step 1 is 3"),
        (lambda: Program.identity(3).skip(0, 3), "empty program"),
        (
            lambda: Program.from_segments([Segment(0, 1), Segment(2, 3)], 3),
            "segment 1 covers layers 2:3.*starts at 1",
        ),
        (
            lambda: Program.from_segments([Segment(0, 2), Segment(1, 3)], 3),
            "segment 1 covers layers 1:3",
        ),
        (lambda: Program.from_segments([Segment(0, 2)], 3), "stop at layer 2 of depth 3"),
        (lambda: Program.from_segments([Segment(0, 4)], 3), "segment 0 covers layers 0:4"),
        (lambda: Program.from_segments([Segment(0, 3, SKIP)], 3), "empty program"),
        (
            lambda: Program.from_edits([Edit(1, 2, SKIP), Edit(2, 1, REPEAT)], 4),
            "1:3 and 2:3 overlap",
        ),
        (lambda: Program.from_edits([Edit(3, 2, SKIP)], 4), "3:5 reaches beyond layer 3"),
        (lambda: Segment(2, 2), "stop .* is 2"),
        (lambda: Segment(0, 1, REPEAT), "times=1"),
        (lambda: Segment(0, 1, KEEP, 2), "only a repeat"),
        (lambda: Segment(0, 1, SKIP, 1, 0.5), "only a repeat"),
        (
            lambda: Segment(0, 1, cast(Op, "loop")),
            "op of segment 0:1 is 'loop'; use one of skip, keep, repeat",
        ),
        (lambda: Segment(0, 1, REPEAT, 2, 1.5), "damping of segment 0:1 is 1.5"),
        (lambda: Edit(0, 1, KEEP), "op keep"),
        (lambda: Edit(0, 1, SKIP, 3), "times=3"),
        (lambda: Blend(1, 1, 0.5), "stop .* is 1"),
        (lambda: Blend(0, 1, 0.0), "damping .* is 0.0"),
        (
            lambda: Program(2, (0, 1), (Blend(1, 3, 0.5),)),
            "steps 1:3 reaches beyond the last of 2 steps",
        ),
        (
            lambda: Program(3, (0, 1, 2), (Blend(0, 2, 0.5), Blend(1, 3, 0.5))),
            "0:2 and 1:3 overlap",
        ),
        (lambda: Program(2, (0, 1), ((0, 1, 0.5),)), r"blends holds \(0, 1, 0.5\)"),  # pyright: ignore
        (lambda: Program(1, (0,), (Blend(0, 1, 1e-300),) * 2), "damping .* is 0.0"),
        (lambda: Program.parse(b"0 /1"), r"text is b'0 /1' \(bytes\)"),  # pyright: ignore
    ],
)
def test_bad_values(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        build()
    assert isinstance(caught.value, PolarError) and isinstance(caught.value, ValueError)


# Fingerprint, cost, imports


def test_fingerprint_is_the_documented_hash() -> None:
    program = Program.parse("0 (1)*2@0.5 /2")
    canonical = '{"blends":[[2,3,0.5]],"depth":2,"path":[0,1,1],"version":1}'
    assert program.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()[:32]
    assert program.fingerprint == "22f2da529a31f94f314db0ada9f39f60"


@pytest.mark.child_process
def test_fingerprint_is_stable_across_processes() -> None:
    code = (
        "from polar_fx.program import Program; print(Program.parse('0-3 (4)*3@0.1 9 "
        "/12').fingerprint)"
    )
    found = set()
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        found.add(
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
    assert found == {Program.parse("0-3 (4)*3@0.1 9 /12").fingerprint + "\n"}


def test_large_programs_are_fast() -> None:
    program = Program.from_segments(
        [Segment(i, i + 2, REPEAT, 4, 0.5) for i in range(0, 100, 2)], 100
    )
    assert program.num_steps == 400
    for work in (
        program.segments,
        lambda: str(program),
        lambda: Program.parse(str(program)),
        program.schedule,
    ):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        assert best < 0.05  # about 2 ms here


@pytest.mark.child_process
def test_import_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, polar_fx.program; print(sorted({'torch', 'transformers', 'numpy'} & "
        "set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
