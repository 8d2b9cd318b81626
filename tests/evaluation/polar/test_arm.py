"""PoLar's network as a method: what it learns from records, and what its decoders may choose."""

import functools

import pytest
import torch
from torch import Tensor

from polar_fx.errors import InputError
from polar_fx.evaluation.polar.arm import PolarArm, question_programs, train_polar_arm
from polar_fx.evaluation.polar.decode import decode_budget
from polar_fx.evaluation.polar.network import NetworkConfig, PolarNetwork
from polar_fx.evaluation.polar.training import NetworkTraining
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.runtime.trunk import shares_trunk
from polar_fx.search.records.records import SearchRecord
from search_samples import record, simple

DEPTH = 6
IDENTITY = Program.identity(DEPTH)


def parse(text: str) -> Program:
    return Program.parse(text, DEPTH)


def test_question_programs_count_verified_verdicts_and_the_trunk() -> None:
    early, late, other = parse("skip 0"), parse("skip 3"), parse("repeat 4")
    found = record(
        "q",
        Verdict(True),
        explored={early: Verdict(True), late: Verdict(True), other: Verdict(True)},
        verified={late: False},
    )
    assert (
        question_programs(found, 2).valid == (other,)
        and question_programs(found, 2).identity_correct
    )
    assert question_programs(found, 0).valid == (early, other)
    overturned = record(
        "q", Verdict(True), explored={other: Verdict(True)}, verified={IDENTITY: False, other: True}
    )
    assert not question_programs(overturned, 2).identity_correct
    confirmed = record(
        "q", Verdict(False), explored={late: Verdict(False)}, verified={IDENTITY: True}
    )
    assert question_programs(confirmed, 2).identity_correct


def _searched(name: str, count: int) -> tuple[list[SearchRecord], dict[str, Tensor]]:
    """Questions of even numbers are answered with layer 3 skipped, others with layer 4 repeated; a
    feature tells which.
    """
    generator = torch.Generator().manual_seed(len(name))
    records, features = [], {}
    for i in range(count):
        program = parse("repeat 4") if i % 2 else parse("skip 3")
        records.append(simple(f"{name}{i}", {program, parse("skip 0")}, wrong={parse("skip 5")}))
        states = torch.randn(4, 3, generator=generator) * 0.1
        states[:, 0] += 2.0 * (-1) ** i
        features[f"{name}{i}"] = states
    return records, features


NETWORK = NetworkConfig(DEPTH, 3, width=16, heads=2, blocks=1, dropout=0.0, residual=True)


def test_the_arm_learns_what_is_planted() -> None:
    (train, features), (validation, held_out) = _searched("train", 32), _searched("validation", 8)
    unanswered = simple("none", set(), wrong={parse("skip 5")})
    off = record(
        "off",
        Verdict(True),
        explored={parse("skip 0"): Verdict(True)},
        verified={IDENTITY: False, parse("skip 0"): False},
    )
    config = NetworkTraining(learning_rate=5e-3, batch_size=8, epochs=25, seed=1)
    train_again = functools.partial(
        train_polar_arm,
        [*train, unanswered, off],
        validation,
        token_features_by_id=features | held_out,
        depth=DEPTH,
        num_steps=2,
        network=NETWORK,
        training=config,
    )
    trained, counts = train_again()
    assert counts["train"].labels.questions == 34 and counts["train"].labels.unanswered == 2
    assert (
        counts["train"].labels.rows == 32
        and counts["train"].off_trunk == 32
        and counts["train"].overturned == 2
    )
    assert counts["validation"].off_trunk == 8 and counts["validation"].overturned == 0
    arm = PolarArm(trained.network, 2)
    asked, expected = (
        list(held_out.values()),
        [parse("repeat 4") if i % 2 else parse("skip 3") for i in range(8)],
    )
    assert [programs[0] for programs in arm.beam(asked)] == expected
    assert [programs[0] for programs in arm.joint(asked)] == expected
    assert arm.budget(asked, 5 / 6)[::2] == expected[::2]
    for programs in arm.beam(asked):
        assert 1 <= len(programs) <= 5 and len(set(programs)) == len(programs)
    again, _ = train_again()
    assert again.history == trained.history


def test_records_and_features_that_do_not_fit_are_refused() -> None:
    train, features = _searched("train", 4)
    with pytest.raises(InputError, match="question 'train0' is in train and in validation"):
        train_polar_arm(
            train,
            train[:1],
            token_features_by_id=features,
            depth=DEPTH,
            num_steps=2,
            network=NETWORK,
        )
    with pytest.raises(InputError, match="validation question 'train2' has no token features"):
        train_polar_arm(
            train[:2],
            train[2:],
            token_features_by_id={q: features[q] for q in ("train0", "train1")},
            depth=DEPTH,
            num_steps=2,
            network=NETWORK,
        )
    with pytest.raises(InputError, match="no label rows"):
        train_polar_arm(
            train,
            [simple("x", set())],
            token_features_by_id=features,
            depth=DEPTH,
            num_steps=2,
            network=NETWORK,
        )


class Said(PolarNetwork):
    """Boundary and op logits [D] and [D, 3] that are given, whatever the question."""

    def __init__(self, boundary: Tensor, op: Tensor) -> None:
        super().__init__(NetworkConfig(DEPTH, 3, width=4, heads=1, blocks=1))
        self.said = boundary, op

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        boundary, op = self.said
        return boundary.expand(len(features), -1), op.expand(len(features), -1, -1)


def _said(ops: list[int]) -> PolarArm:
    """Every layer a segment, with these classes."""
    return PolarArm(Said(torch.full((DEPTH,), 4.0), torch.eye(3)[ops] * 3.0), 2)


QUESTION = [torch.ones(2, 3)]


def test_what_does_not_share_the_trunk_is_left_out() -> None:
    arm = _said([1, 0, 1, 1, 0, 1])  # the likeliest of all skips a layer of the trunk
    # with one asked for, nothing is left: decoded again, the trunk kept
    assert arm.joint(QUESTION) == [[parse("skip 4")]]
    beam = arm.beam(QUESTION)[0]
    assert beam[0] == parse("skip 4") and all(shares_trunk(p, 2) for p in beam)
    assert arm.budget(QUESTION, 0.9) == [parse("skip 4")]


@pytest.mark.parametrize("fraction, steps", [(0.5, 3), (4 / 6, 4), (5 / 6, 5), (1.0, 6)])
def test_budgets_hold_whatever_the_network_says(fraction: float, steps: int) -> None:
    # the likeliest is the trunk alone, which is no program
    (program,) = _said([1, 1, 0, 0, 0, 0]).budget(QUESTION, fraction)
    assert program.num_steps == steps and shares_trunk(program, 2)
    (program,) = _said([0, 0, 2, 2, 2, 2]).budget(QUESTION, fraction)
    assert program.num_steps <= steps and shares_trunk(program, 2)


def test_budget_takes_the_likeliest_that_fits() -> None:
    with pytest.raises(InputError, match=r"give 0.500 to 1"):
        _said([1] * 6).budget(QUESTION, 0.4)
    torch.manual_seed(0)
    network = PolarNetwork(
        NetworkConfig(DEPTH, 3, width=8, heads=2, blocks=1, residual=True)
    ).eval()
    arm, asked = PolarArm(network, 0), [torch.randn(n, 3) for n in (1, 4)]
    for features, program in zip(asked, arm.budget(asked, 0.75), strict=True):
        with torch.no_grad():
            boundary, op = network(features[None], torch.ones(1, len(features), dtype=torch.bool))
        assert program == decode_budget(boundary[0], op[0], budget=4, exact=False).program
