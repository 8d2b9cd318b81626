"""Logits to programs: by hand, and against every segmentation with all ops on few layers."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from polar_fx.errors import InputError
from polar_fx.evaluation.polar.decode import (
    Decoded,
    decode_beam,
    decode_budget,
    decode_joint,
    segment_starts,
)
from polar_fx.evaluation.polar.labels import parse_labels
from polar_fx.program import Edit, Op, Program

Derivation = tuple[tuple[int, ...], tuple[int, ...], float]
"""Segment starts, path, log-probability."""


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def random_logits(seed: int, depth: int, *, ops: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(depth, generator=generator), 2 * torch.randn(
        depth, ops, generator=generator
    )


def everything(
    boundary_logits: Tensor, op_logits: Tensor, *, max_length: int
) -> Iterator[Derivation]:
    """Every segmentation with all ops, straight from the definition."""
    depth = len(boundary_logits)
    probabilities, op_probabilities = (
        boundary_logits.double().sigmoid(),
        op_logits.double().softmax(-1),
    )
    for bits in itertools.product((False, True), repeat=depth - 1):
        starts = [0, *(layer for layer in range(1, depth) if bits[layer - 1])]
        lengths = [b - a for a, b in zip(starts, [*starts[1:], depth], strict=True)]
        if max(lengths) > max_length:
            continue
        of_bits = math.prod(
            float(probabilities[i + 1] if bit else 1 - probabilities[i + 1])
            for i, bit in enumerate(bits)
        )
        for classes in itertools.product(range(op_logits.shape[1]), repeat=len(starts)):
            path: list[int] = []
            for start, length, op in zip(starts, lengths, classes, strict=True):
                path += [*range(start, start + length)] * op
            of_ops = math.prod(
                float(op_probabilities[start, op])
                for start, op in zip(starts, classes, strict=True)
            )
            yield tuple(starts), tuple(path), math.log(of_bits * of_ops)


def ranked(found: Iterator[Derivation], depth: int) -> list[tuple[Program, float]]:
    """Distinct programs with the best score of each, the empty path being the identity's."""
    best: dict[Program, float] = {}
    for _, path, score in found:
        program = Program.from_path(path or range(depth), depth)
        best[program] = max(best.get(program, -math.inf), score)
    return sorted(best.items(), key=lambda item: -item[1])


def assert_same(got: list[Decoded], want: list[tuple[Program, float]]) -> None:
    for each, (program, score) in zip(got, want, strict=True):
        assert each.program == program
        assert each.log_probability == pytest.approx(score)


# Starts


def test_starts_by_hand() -> None:
    likely = {5, 6, 15}
    logits = torch.tensor([0.1 if layer in likely else -0.1 for layer in range(18)])
    assert segment_starts(logits) == (0, 4, 5, 6, 10, 14, 15)
    assert segment_starts(logits, threshold=0.6) == (0, 4, 8, 12, 16)
    assert segment_starts(logits, threshold=0.6, max_length=7) == (0, 7, 14)
    assert segment_starts(torch.full((3,), 9.0)) == (0, 1, 2)
    assert segment_starts(torch.tensor([-9.0, 0.0, -9.0])) == (0, 1)  # sigmoid(0) is the threshold


# Beam


def test_beam_by_hand() -> None:
    """Segments 0:2 and 2:3 with ops (.1, .6, .3) and (.5, .2, .3): products .30, .18, .15, .09."""
    boundary_logits = torch.tensor([0.0, logit(0.25), logit(0.75)])
    op_logits = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.5, 0.2, 0.3]]).log()
    got = decode_beam(boundary_logits, op_logits)
    assert [each.program.path for each in got] == [
        (0, 1),
        (0, 1, 2, 2),
        (0, 1, 0, 1),
        (0, 1, 0, 1, 2, 2),
    ]
    bits = 0.75 * 0.75
    assert [math.exp(each.log_probability) for each in got] == pytest.approx(
        [0.30 * bits, 0.18 * bits, 0.15 * bits, 0.09 * bits]
    )
    assert decode_beam(boundary_logits, op_logits, beam=2) == got[:2]
    assert [each.program.path for each in decode_beam(boundary_logits, op_logits, top_ops=1)] == [
        (0, 1)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_beam_is_the_best_of_one_segmentation(seed: int) -> None:
    depth = 5
    boundary_logits, op_logits = random_logits(seed, depth)
    starts = segment_starts(boundary_logits, max_length=2)
    top = {start: set(op_logits[start].topk(2).indices.tolist()) for start in starts}

    def allowed(path: tuple[int, ...]) -> bool:
        return all(path.count(start) in top[start] for start in starts)

    found = (
        each
        for each in everything(boundary_logits, op_logits, max_length=2)
        if each[0] == starts and allowed(each[1])
    )
    best = sorted(found, key=lambda each: -each[2])[:5]
    assert_same(decode_beam(boundary_logits, op_logits, max_length=2), ranked(iter(best), depth))


def test_skipping_everything_is_the_identity() -> None:
    """All three layers alone with probability .8^2, each skipped with .7 and kept with .2."""
    boundary_logits, op_logits = (
        torch.full((3,), logit(0.8)),
        torch.tensor([0.7, 0.2, 0.1]).log().expand(3, -1),
    )
    for got in (decode_beam(boundary_logits, op_logits), decode_joint(boundary_logits, op_logits)):
        assert (
            got[0].program.is_identity
            and [each.program.is_identity for each in got].count(True) == 1
        )
        assert math.exp(got[0].log_probability) == pytest.approx(0.8**2 * 0.7**3)


# Joint


@pytest.mark.parametrize(
    "depth, ops, max_length", [(1, 3, 4), (4, 3, 4), (5, 3, 4), (5, 3, 2), (4, 4, 3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_joint_is_exact(depth: int, ops: int, max_length: int, seed: int) -> None:
    logits = random_logits(seed, depth, ops=ops)
    want = ranked(everything(*logits, max_length=max_length), depth)
    for count in (1, 5, 30):
        assert_same(decode_joint(*logits, count=count, max_length=max_length), want[:count])


def test_joint_counts_a_program_once() -> None:
    """With boundaries open, keep-keep of 2 + 2 or of 1 + 3 layers is the same program; the best one
    counts.
    """
    got = decode_joint(torch.zeros(4), torch.zeros(4, 3), count=1000)
    assert (
        len({each.program for each in got})
        == len(got)
        == len(ranked(everything(torch.zeros(4), torch.zeros(4, 3), max_length=4), 4))
    )


def test_joint_finds_what_thresholding_averages_away() -> None:
    """Two labels of equal weight, the identity's and 'skip 5': each bit of the second's own is
    below one half.
    """
    depth = 12
    programs = [Program.identity(depth)] * 11 + [
        Program.from_edits([Edit(5, 1, Op.SKIP)], depth)
    ] * 9
    labels = [parse_labels(program) for program in programs]
    mean = (
        torch.tensor([each.boundaries for each in labels], dtype=torch.float64)
        .mean(0)
        .clamp(1e-3, 1 - 1e-3)
    )
    ops = torch.full((depth, 3), 1e-3, dtype=torch.float64)
    for layer in range(depth):
        for each in labels:
            ops[layer, each.ops[layer]] += each.boundaries[layer]
    logits = (mean / (1 - mean)).log(), ops.log()
    assert segment_starts(logits[0]) == (0, 4, 8)
    skip = Program.from_edits([Edit(5, 1, Op.SKIP)], depth)
    assert skip not in [each.program for each in decode_beam(*logits)]
    got = [each.program for each in decode_joint(*logits)]
    assert got[0].is_identity and skip in got


# Budget


@pytest.mark.parametrize("depth, ops, max_length", [(1, 3, 4), (4, 3, 4), (5, 3, 2), (4, 4, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_budget_is_exact(depth: int, ops: int, max_length: int, seed: int) -> None:
    logits = random_logits(seed, depth, ops=ops)
    found = [each for each in everything(*logits, max_length=max_length) if each[1]]
    got = None
    for budget in range(1, depth * (ops - 1) + 1):
        for exact in (True, False):
            fits = [
                each
                for each in found
                if len(each[1]) == budget or (not exact and len(each[1]) < budget)
            ]
            got = decode_budget(*logits, budget=budget, exact=exact, max_length=max_length)
            assert_same([got], ranked(iter(fits), depth)[:1])
    assert decode_budget(*logits, budget=99, exact=False, max_length=max_length) == got


def test_budget_by_hand() -> None:
    """Every layer alone, ops (.2, .7, .1), (.4, .5, .1), (.3, .4, .3): dropping layer 1 costs
    least, repeating layer 2 too.
    """
    op_logits = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.5, 0.1], [0.3, 0.4, 0.3]]).log()
    logits = torch.full((3,), 30.0), op_logits
    paths = [decode_budget(*logits, budget=budget).program.path for budget in range(1, 7)]
    assert paths == [(0,), (0, 2), (0, 1, 2), (0, 1, 2, 2), (0, 1, 1, 2, 2), (0, 0, 1, 1, 2, 2)]
    assert math.exp(decode_budget(*logits, budget=2).log_probability) == pytest.approx(
        0.7 * 0.4 * 0.4
    )
    assert decode_budget(*logits, budget=6, exact=False).program.is_identity


def test_budget_never_gives_the_empty_program() -> None:
    logits = torch.full((3,), 4.0), torch.tensor([9.0, 1.0, -9.0]).expand(3, -1)
    assert decode_budget(*logits, budget=2, exact=False).program.num_steps == 1


# Inputs


def test_logits_of_a_network_in_half_precision() -> None:
    boundary_logits, op_logits = random_logits(0, 6)
    half = boundary_logits.bfloat16().requires_grad_(), op_logits.bfloat16()
    assert decode_joint(*half) == decode_joint(half[0].float(), half[1].float())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b, o: decode_beam(b[None], o), r"\[1, 4\]"),
        (lambda b, o: decode_beam(b, o[:3]), r"\[3, 3\]"),
        (lambda b, o: decode_joint(b, o[:, :1]), r"\[4, 1\]"),
        (lambda b, o: decode_joint(b, o.clone().fill_(math.nan)), "not finite"),
        (lambda b, o: decode_joint(b, o, count=0), "count is 0"),
        (lambda b, o: decode_beam(b, o, beam=0), "beam is 0"),
        (lambda b, o: decode_beam(b, o, top_ops=0), "top_ops is 0"),
        (lambda b, o: segment_starts(b, max_length=0), "max_length is 0"),
        (lambda b, o: decode_budget(b, o, budget=0), "budget is 0"),
        (lambda b, o: decode_budget(b, o, budget=9), "budget is 9"),
    ],
)
def test_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(torch.zeros(4), torch.zeros(4, 3))
