"""Labels of PoLar's network: the parser against another one, rows and weights, the loss by hand."""

import math
import random
from functools import cache

import pytest
import torch

from polar_fx.errors import InputError, NotSegmentableError, ProgramError
from polar_fx.evaluation.polar.labels import (
    LabelCounts,
    QuestionPrograms,
    label_losses,
    label_rows,
    label_tensors,
    parse_labels,
)
from polar_fx.program import Edit, Op, Program


def starts(program: Program) -> list[int]:
    return [layer for layer, bit in enumerate(parse_labels(program).boundaries) if bit]


def best_parse(path: tuple[int, ...], depth: int, *, max_length: int = 4, repeat_times: int = 2):
    """The rules of PoLar's parser, word by word, as a dynamic program over every move: (size,
    class) of the segments, or None.
    """

    def rank(parse: tuple[tuple[int, int], ...]):
        skips = sum(op == 0 for _, op in parse)
        repeats = sum(op > 1 for _, op in parse)
        return len(parse), skips, -repeats, [-size for size, _ in parse]

    @cache
    def parse(layer: int, step: int) -> tuple[tuple[int, int], ...] | None:
        if layer == depth:
            return () if step == len(path) else None
        found = []
        for size in range(1, min(max_length, depth - layer) + 1):
            for op in range(repeat_times + 1):
                part = tuple(range(layer, layer + size)) * op
                if (
                    path[step : step + len(part)] == part
                    and (rest := parse(layer + size, step + len(part))) is not None
                ):
                    found.append(((size, op), *rest))
        return min(found, key=rank, default=None)

    return parse(0, 0)


def random_program(rng: random.Random, depth: int) -> Program:
    """Up to 4 nested edits, so that some have no segments."""
    program = Program.identity(depth)
    for _ in range(rng.randrange(5)):
        length = rng.randint(1, min(6, program.num_steps))
        start = rng.randrange(program.num_steps - length + 1)
        if rng.random() < 0.5 and length < program.num_steps:
            program = program.skip(start, length)
        else:
            program = program.repeat(start, length, times=rng.randint(2, 3))
    return program


# The parser


@pytest.mark.parametrize("limits", [(4, 2), (4, 4), (1, 2), (3, 3)])
def test_labels_are_the_best_parse(limits: tuple[int, int]) -> None:
    rng, parsed = random.Random(0), 0
    for _ in range(300):
        program = random_program(rng, rng.randint(1, 14))
        want = best_parse(program.path, program.depth, max_length=limits[0], repeat_times=limits[1])
        if want is None:
            with pytest.raises(NotSegmentableError):
                parse_labels(program, max_length=limits[0], repeat_times=limits[1])
            continue
        got = parse_labels(program, max_length=limits[0], repeat_times=limits[1])
        assert got.boundaries == tuple(int(i == 0) for size, _ in want for i in range(size))
        assert got.ops == tuple(op for size, op in want for _ in range(size))
        parsed += 1
    assert 50 < parsed < 290


def test_labels_by_hand() -> None:
    assert starts(Program.identity(28)) == [0, 4, 8, 12, 16, 20, 24]
    assert starts(Program.from_edits([Edit(5, 1, Op.SKIP)], 28)) == [0, 4, 5, 6, 10, 14, 18, 22, 26]
    labels = parse_labels(Program.parse("0-1 (2-3)*2 6 /7"))
    assert labels.boundaries == (1, 0, 1, 0, 1, 0, 1) and labels.ops == (1, 1, 2, 2, 0, 0, 1)


def test_labels_of_a_path() -> None:
    assert parse_labels([0, 0, 2], 3) == parse_labels(Program.from_path([0, 0, 2], 3))
    with pytest.raises(InputError, match="depth"):
        parse_labels([0, 1])
    with pytest.raises(ProgramError):
        parse_labels([0, 3], 3)


def test_more_repeats_need_more_classes() -> None:
    program = Program.parse("0 (1-2)*3 3 /4")
    with pytest.raises(NotSegmentableError):
        parse_labels(program)
    assert parse_labels(program, repeat_times=3).ops == (1, 3, 3, 1)


def test_what_labels_cannot_say() -> None:
    with pytest.raises(NotSegmentableError):
        parse_labels([0, 1, 2, 3, 2, 4, 5], 6)
    with pytest.raises(NotSegmentableError, match="damping"):
        parse_labels(Program.identity(4).repeat(1, damping=0.5))
    with pytest.raises(NotSegmentableError):
        parse_labels(Program.identity(8).repeat(0, 5))


# Rows

D = 4
SHORTER, LONGER = Program.parse("0-2 /4"), Program.parse("0-2 3 3 /4")
UNPARSABLE = Program.from_path([0, 1, 0, 2, 3], D)
IDENTITY = Program.identity(D)


def weights(*questions: QuestionPrograms, **settings) -> dict[tuple[str, Program], float]:
    return {
        (row.question, row.program): row.weight for row in label_rows(questions, D, **settings).rows
    }


def test_weights_by_hand() -> None:
    got = weights(
        QuestionPrograms("shorter", True, (SHORTER, LONGER)),
        QuestionPrograms("longer", True, (LONGER,)),
        QuestionPrograms("rescued", False, (SHORTER, LONGER)),
        QuestionPrograms("alone", True, ()),
    )
    assert got == pytest.approx(
        {
            ("shorter", IDENTITY): 0.3 / 2.3,
            ("shorter", SHORTER): 1 / 2.3,
            ("shorter", LONGER): 1 / 2.3,
            ("longer", IDENTITY): 0.5,
            ("longer", LONGER): 0.5,
            ("rescued", SHORTER): 0.5,
            ("rescued", LONGER): 0.5,
            ("alone", IDENTITY): 1.0,
        }
    )
    assert (
        weights(QuestionPrograms("q", True, (SHORTER,)), identity_weight=1.0)["q", IDENTITY] == 0.5
    )


def test_everything_is_accounted_for() -> None:
    found = label_rows(
        [
            QuestionPrograms("none", False, ()),
            QuestionPrograms("lost", False, (UNPARSABLE,)),
            QuestionPrograms("some", True, (UNPARSABLE, SHORTER, SHORTER, LONGER)),
        ],
        D,
        max_paths=2,
    )
    assert found.counts == LabelCounts(
        questions=3, unanswered=1, unlabelled=1, rows=2, unparsable=2, left_out=1
    )
    assert [row.question for row in found.rows] == ["some", "some"] and found.rows[
        0
    ].program == IDENTITY
    assert all(row.labels == parse_labels(row.program) for row in found.rows)


def test_the_limit_draws_the_same_programs_in_any_order() -> None:
    depth = 12
    programs = [
        Program.from_edits([Edit(a, 1, Op.SKIP), Edit(b, 1, Op.REPEAT)], depth)
        for a in range(11)
        for b in range(a + 1, 12)
    ]
    rng, drawn = random.Random(0), []
    for seed in (0, 0, 0, 1):
        rng.shuffle(programs)
        found = label_rows([QuestionPrograms("q", True, tuple(programs))], depth, seed=seed)
        assert (
            len(found.rows) == 50
            and found.counts.left_out == 17
            and found.rows[0].program.is_identity
        )
        assert sum(row.weight for row in found.rows) == pytest.approx(1)
        drawn.append({row.program for row in found.rows})
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]
    other = label_rows([QuestionPrograms("other", True, tuple(programs))], depth)
    assert {row.program for row in other.rows} != drawn[0]


@pytest.mark.parametrize(
    "questions, settings, message",
    [
        ([QuestionPrograms("q", True, ())] * 2, {}, "'q' came twice"),
        ([QuestionPrograms("q", False, (IDENTITY,))], {}, "identity"),
        ([QuestionPrograms("q", True, (Program.identity(5),))], {}, "depth 5"),
        ([], {"max_paths": 0}, "max_paths is 0"),
        ([], {"identity_weight": 0}, "identity_weight is 0"),
    ],
)
def test_refused(questions: list[QuestionPrograms], settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_rows(questions, D, **settings)


def test_tensors() -> None:
    rows = label_rows([QuestionPrograms("q", True, (SHORTER,))], D).rows
    boundaries, ops, row_weights = label_tensors(rows)
    assert boundaries.tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]] and boundaries.dtype == torch.float32
    assert ops.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]] and ops.dtype == torch.int64
    assert row_weights.tolist() == pytest.approx([0.3 / 1.3, 1 / 1.3])
    with pytest.raises(InputError, match="no label rows"):
        label_tensors([])


# The loss


def test_losses_by_hand() -> None:
    """Layer 0's bit does not count, nor ops beside starts; the op loss is a mean over a row's own
    starts.
    """
    logit = math.log(3)  # of probability 3/4
    boundary_logits = torch.tensor([[-50.0, logit, logit], [-50.0, 0.0, logit]])
    op_logits = torch.tensor(
        [[[0.0, math.log(2), 0.0], [99.0, 0.0, -99.0], [0.0, 0.0, 0.0]]]
    ).expand(2, -1, -1)
    boundaries, ops = (
        torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[1, 1, 0], [0, 0, 0]]),
    )
    boundary, op = label_losses(boundary_logits, op_logits, boundaries=boundaries, ops=ops)
    assert boundary.tolist() == pytest.approx(
        [(math.log(4) + math.log(4 / 3)) / 2, (math.log(2) + math.log(4)) / 2]
    )
    assert op.tolist() == pytest.approx([(math.log(2) + math.log(3)) / 2, math.log(4)])


def test_losses_of_one_layer() -> None:
    boundary, op = label_losses(
        torch.zeros(1, 1),
        torch.zeros(1, 1, 3),
        boundaries=torch.ones(1, 1),
        ops=torch.ones(1, 1, dtype=torch.int64),
    )
    assert boundary.tolist() == [0.0] and op.tolist() == pytest.approx([math.log(3)])
