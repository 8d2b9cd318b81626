"""Baselines: their labels, losses and choices by hand, and that each learns what is planted for
it.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polar_fx
from polar_fx.errors import InputError, KvOverflowError
from polar_fx.evaluation import layer_router as routers
from polar_fx.evaluation.block_influence import block_influences, least_influence_program
from polar_fx.evaluation.layer_router import (
    OPS,
    SKIP_OPS,
    LayerRouter,
    RouterConfig,
    RouterNetwork,
    train_layer_router,
)
from polar_fx.evaluation.polar.arm import PolarArm, question_programs, train_polar_arm
from polar_fx.evaluation.polar.decode import decode_budget
from polar_fx.evaluation.polar.network import NetworkConfig, PolarNetwork
from polar_fx.evaluation.polar.training import NetworkTraining
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.runtime.trunk import shares_trunk
from polar_fx.search.records.records import SearchRecord
from search_samples import record, simple
from tiny_search import peaked

DEPTH = 6
IDENTITY = Program.identity(DEPTH)


def parse(text: str) -> Program:
    return Program.parse(text, DEPTH)


def test_windows_are_means_of_consecutive_tokens() -> None:
    hidden = torch.arange(10.0)[:, None] * torch.tensor([1.0, -1.0])
    # 10 tokens in 4 windows: 0-1, 2-4, 5-6, 7-9
    assert routers.pool_windows(hidden, 4)[:, 0].tolist() == [0.5, 3.0, 5.5, 8.0]
    assert routers.pool_windows(hidden, 4)[:, 1].tolist() == [-0.5, -3.0, -5.5, -8.0]
    with pytest.raises(InputError, match="at least one token"):
        routers.pool_windows(torch.empty(0, 4))


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 64])
def test_windows_hold_every_token(tokens: int) -> None:
    shares = routers.pool_windows(torch.eye(tokens))
    assert shares.shape == (8, tokens) and torch.allclose(shares.sum(1), torch.ones(8))
    times = (shares > 0).sum(0)
    assert int(times.min()) >= 1 and (tokens < 8 or int(times.max()) == 1)


def test_best_program_is_the_shortest_that_is_right_and_shares_the_trunk() -> None:
    short, shorter, early = parse("skip 3"), parse("skip 3-4"), parse("skip 0-3")
    assert routers.best_program(simple("q", {short, shorter, early}, baseline=True), 2) == shorter
    assert routers.best_program(simple("q", {short, shorter, early}, baseline=True), 0) == early
    assert routers.best_program(simple("q", {parse("repeat 4")}, baseline=True), 2) == IDENTITY
    assert routers.best_program(simple("q", {parse("repeat 4")}), 2) == parse("repeat 4")
    assert routers.best_program(simple("q", {early, parse("repeat 3-4 @0.5")}), 2) is None
    # of equals the first explored, and what verification overturned is not right
    equal = record(
        "q", Verdict(False), {parse("skip 4"): Verdict(True), parse("skip 2"): Verdict(True)}
    )
    assert routers.best_program(equal, 2) == parse("skip 4")
    again = record("q", Verdict(True), {shorter: Verdict(True)}, {shorter: False})
    assert routers.best_program(again, 2) == IDENTITY
    again = record("q", Verdict(True), {shorter: Verdict(True)}, {shorter: False, IDENTITY: False})
    assert routers.best_program(again, 2) is None


def test_router_labels_by_hand() -> None:
    records = [
        simple("a", {parse("skip 3")}, baseline=True),
        simple("b", {parse("repeat 4 x3")}),
        simple("c", set(), {parse("skip 3")}),
        simple("d", {parse("repeat 3-4")}),
        simple("e", set(), baseline=True),
        simple("f", {Program.from_path([0, 1, 3, 2, 4], DEPTH)}),
        simple("g", {parse("repeat 5")}),
    ]
    labels = routers.router_labels(records, DEPTH, 2)
    assert labels.questions == ("a", "b", "d", "e", "f", "g") and labels.unanswered == 1
    assert labels.classes.tolist() == [
        [1, 0, 1, 1],
        [1, 1, 2, 1],
        [1, 2, 2, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 1, 2],
    ]
    # three runs, a repeat of two layers together, and layers in another order are not what the
    # classes say
    assert labels.inexact == 3
    assert torch.bincount(labels.classes.flatten()).tolist() == [2, 18, 4]
    assert routers.program_of(labels.classes[2].tolist(), 2) == Program.from_path(
        [0, 1, 2, 3, 3, 4, 4, 5], DEPTH
    )
    # nothing after the trunk is the identity
    assert routers.program_of([0, 0, 0], 3) == routers.program_of([0] * DEPTH, 0) == IDENTITY
    assert routers.program_of([0, 1, 0], 3) == Program.from_path([0, 1, 2, 4], DEPTH)
    with pytest.raises(InputError, match="depth 6, not 8"):
        routers.router_labels(records, 8, 2)
    with pytest.raises(InputError, match="leaves nothing to decide"):
        routers.router_labels(records, DEPTH, DEPTH)
    assert routers.router_labels([simple("c", set())], DEPTH, 2).classes.shape == (0, 4)


def test_class_weights_by_hand() -> None:
    weights = routers.class_weights(torch.tensor([1, 2, 0]), beta=0.5)
    # 0.5/0.5 = 1 and 0.5/0.75 = 2/3, scaled to a mean of 1 over the two that occur
    assert weights.tolist() == pytest.approx([1.2, 0.8, 0.0])
    # the counts of the paper: rare classes barely weigh more, since all are near 1 / (1 - beta) or
    # above
    skip, execute, repeat = routers.class_weights(torch.tensor([4399, 120956, 1457])).tolist()
    assert repeat / execute == pytest.approx(1 / (1 - 0.999**1457), rel=1e-5)
    assert skip / execute == pytest.approx(1 / (1 - 0.999**4399), rel=1e-5)
    with pytest.raises(InputError, match="no class occurs"):
        routers.class_weights(torch.zeros(3, dtype=torch.int64))


def test_focal_loss_by_hand() -> None:
    # p = (1/2, 1/4, 1/4) and (1/8, 3/4, 1/8), in one question of two layers
    scores = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]]).log()
    weights = torch.tensor([2.0, 1.0, 0.5])
    found = routers.focal_loss(scores, torch.tensor([[0, 2]]), weights)
    assert found.item() == pytest.approx(
        (2 * 0.25 * math.log(2) + 0.5 * (7 / 8) ** 2 * math.log(8)) / 2
    )


def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows [N, 8, 5] and classes [N, 4]: layer 1 repeats where number 0 is large, layer 3 is
    skipped where number 2 is.
    """
    windows = torch.randn(count, 8, 5, generator=torch.Generator().manual_seed(seed)) * 0.3
    signs = torch.randint(0, 2, (count, 5), generator=torch.Generator().manual_seed(seed + 100))
    # a large constant, as hidden states have
    windows += 5000 * torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
    windows += 2 * (signs[:, None] * 2 - 1)
    classes = torch.ones(count, 4, dtype=torch.int64)
    classes[:, 1] += signs[:, 0]
    classes[:, 3] -= signs[:, 2]
    return windows, classes


CONFIG = RouterConfig(width=16, learning_rate=1e-2, batch=8, epochs=30, seed=3)


def test_scores_are_averaged_over_windows() -> None:
    torch.manual_seed(0)
    network = RouterNetwork(5, 2, 3, width=4)
    windows = torch.randn(3, 8, 5)
    network.standardize_by(windows)
    flat = windows.flatten(0, 1)
    seen = (windows - flat.mean(0)) / flat.std(0, correction=0)
    w1, b1, w2, b2 = network.layers[1].parameters()
    expected = (torch.nn.functional.gelu(seen @ w1.T + b1) @ w2.T + b2).mean(1)
    assert torch.allclose(network(windows)[:, 1], expected, atol=1e-5)


def test_a_router_learns_what_is_planted_and_nothing_else() -> None:
    train, validation, test = planted(64, 0), planted(32, 1), planted(40, 2)
    router, history = train_layer_router(*train, *validation, 2, config=CONFIG)
    assert router.depth == DEPTH and router.classes(test[0]).equal(test[1])
    for program, classes in zip(router.programs(test[0]), test[1].tolist(), strict=True):
        assert program == routers.program_of(classes, 2) and shares_trunk(program, 2)
    assert history["class_counts"] == torch.bincount(train[1].flatten(), minlength=3).tolist()
    assert history["validation_loss"] == min(each["validation"] for each in history["history"])
    # a gate counts every run as one
    gate, of_gate = train_layer_router(*train, *validation, 2, ops=SKIP_OPS, config=CONFIG)
    assert len(of_gate["class_counts"]) == 2 and gate.classes(test[0]).equal(test[1].clamp(max=1))
    # with the labels of other questions there is nothing to learn, and the validation loss says so
    shuffled = train[1][torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    _, nothing = train_layer_router(train[0], shuffled, *validation, 2, config=CONFIG)
    assert history["validation_loss"] < 0.2 * nothing["validation_loss"]


def test_training_is_deterministic_and_leaves_random_state() -> None:
    train, validation = planted(24, 0), planted(12, 1)
    config = RouterConfig(width=4, epochs=3, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, first = train_layer_router(*train, *validation, 2, config=config)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    two, second = train_layer_router(*train, *validation, 2, config=config)
    other, _ = train_layer_router(
        *train, *validation, 2, config=RouterConfig(width=4, epochs=3, seed=6)
    )
    assert first == second
    assert one.probabilities(validation[0]).equal(two.probabilities(validation[0]))
    assert not one.probabilities(validation[0]).equal(other.probabilities(validation[0]))


def test_training_stops_early_with_the_best_epoch() -> None:
    windows, classes = planted(24, 0)
    wrong = classes.clone()
    # validation says the opposite: learning makes it worse
    wrong[:, 1], wrong[:, 3] = 3 - wrong[:, 1], 1 - wrong[:, 3]
    seen: list[int] = []
    config = RouterConfig(width=16, learning_rate=1e-2, epochs=50, patience=4, seed=3)
    router, history = train_layer_router(
        windows, classes, windows, wrong, 2, config=config, progress=lambda e, _: seen.append(e)
    )
    assert history["best_epoch"] + 4 == seen[-1] < 50
    found = routers.focal_loss(
        router.network(windows), wrong, torch.tensor(history["class_weights"])
    ).item()
    assert found == pytest.approx(history["validation_loss"])


class Fixed(RouterNetwork):
    """Scores that are the first window."""

    def __init__(self, layers: int, classes: int) -> None:
        super().__init__(layers * classes, layers, classes, 1)
        self.shape = layers, classes

    def forward(self, windows: Tensor) -> Tensor:
        return windows[:, 0].unflatten(-1, self.shape)


def _skip_scores(chances: list[list[float]]) -> Tensor:
    skip = torch.tensor(chances)
    return torch.stack([skip.log(), (1 - skip).log()], dim=-1).flatten(1)[:, None]


def test_threshold_meets_a_budget_with_the_fewest_skips() -> None:
    windows = _skip_scores([[0.1, 0.6, 0.7], [0.2, 0.3, 0.8]])
    gate = LayerRouter(Fixed(3, 2), 3, SKIP_OPS)
    assert [str(p) for p in gate.programs(windows)] == ["0-3 /6", "0-4 /6"]  # P(skip) above 1/2

    def steps(budget: float) -> list[int]:
        return [p.num_steps for p in gate.with_budget(windows, budget).programs(windows)]

    assert [steps(mean / 6) for mean in (6, 5.5, 5, 4.4)] == [[6, 6], [6, 5], [5, 5], [4, 4]]
    # no row can be skipped altogether: at 0.2 the second would be the identity again
    with pytest.raises(InputError, match=r"below 4.00 of 6 steps.*asks for 3.90"):
        gate.with_budget(windows, 0.65)


def test_threshold_is_exact_on_random_chances() -> None:
    chances = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)).tolist()
    windows, gate = _skip_scores(chances), LayerRouter(Fixed(4, 2), 1, SKIP_OPS)
    levels = sorted(
        {math.inf, *gate.probabilities(windows)[..., 0].flatten().tolist()}, reverse=True
    )
    chosen = [LayerRouter(gate.network, 1, SKIP_OPS, level).programs(windows) for level in levels]
    means = [float(np.mean([p.num_steps for p in programs])) for programs in chosen]
    for budget in (1.0, 0.9, 0.8, 0.7):
        expected = next(
            level for level, mean in zip(levels, means, strict=True) if mean <= budget * 5 + 1e-9
        )
        assert gate.with_budget(windows, budget).threshold == expected


def test_a_threshold_leaves_repeats() -> None:
    scores = torch.tensor([[[0.5, 0.2, 0.3], [0.3, 0.6, 0.1]]]).log().flatten(1)[:, None]
    assert LayerRouter(Fixed(2, 3), 1, OPS, 0.6).classes(scores).tolist() == [[2, 1]]
    assert LayerRouter(Fixed(2, 3), 1, OPS, 0.29).classes(scores).tolist() == [[0, 0]]
    with pytest.raises(InputError, match="needs a router with ops"):
        LayerRouter(Fixed(2, 3), 1, OPS).with_budget(scores, 0.5)


def test_data_that_do_not_fit_are_refused() -> None:
    windows, classes = planted(6, 0)
    refused = [
        ((windows, classes[:5], windows, classes), "train classes have shape"),
        ((windows, classes, windows, classes[:, :3]), "validation classes are of 3 layers"),
        ((windows, classes + 1, windows, classes), "0 .skip., 1"),
        ((windows * math.nan, classes, windows, classes), "number 0 are not finite"),
        ((windows, classes, windows[..., :4], classes), r"\[questions, windows, 5\]"),
    ]
    for data, message in refused:
        with pytest.raises(InputError, match=message):
            train_layer_router(*data, 2)
    with pytest.raises(InputError, match="ops of a router"):
        train_layer_router(windows, classes, windows, classes, 2, ops=("execute", "repeat"))


def _reference(model: Any, prompts: list[Tensor]) -> np.ndarray:
    """By hooks on the model itself, a prompt at a time."""
    model, found = copy.deepcopy(model).eval(), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, output: found.append((args[0][0].double(), output[0].double()))
        )
    with torch.no_grad():
        for row in prompts:
            model(row[None])
    cosines = [
        (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        for before, after in found
    ]
    return np.array([1 - float(torch.cat(cosines[i::DEPTH]).mean()) for i in range(DEPTH)])


def test_influences_are_those_of_the_model() -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 40, (n,), generator=generator) for n in (5, 21, 1, 13)]
    model = peaked()
    with torch.no_grad():  # layer 3 returns its input
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    compiled = polar_fx.compile(model, "eager", max_length=47, prefill_chunk=8, cache=False)
    found = block_influences(compiled, prompts)
    assert found[3] == pytest.approx(0, abs=1e-12)
    assert (np.delete(found, 3) > 0.01).all()
    assert found == pytest.approx(_reference(model, prompts), abs=1e-5)
    assert found == pytest.approx(block_influences(compiled, prompts[::-1]), abs=1e-5)
    assert least_influence_program(found, 1, 2) == parse("skip 3")
    # taken out, nothing changes
    ids = prompts[1][None]
    assert torch.allclose(compiled.forward(ids, program="skip 3"), compiled.forward(ids), atol=1e-4)
    with pytest.raises(KvOverflowError):
        block_influences(compiled, [torch.zeros(48, dtype=torch.long)])


def test_least_influence_program_by_hand() -> None:
    influences = np.array([0.0, 0.3, 0.1, 0.4, 0.1, 0.2])
    assert least_influence_program(influences, 0) == IDENTITY
    assert least_influence_program(influences, 2) == parse("skip 0, skip 2")
    assert least_influence_program(influences, 1, 1) == parse("skip 2")
    assert least_influence_program(influences, 3, 1) == parse("skip 2, skip 4-5")
    assert least_influence_program(influences, 2, 3) == parse("skip 4-5")
    with pytest.raises(InputError, match="give 0 to 2"):
        least_influence_program(influences, 3, 3)


def test_question_programs_count_verified_verdicts_and_the_trunk() -> None:
    early, late, other = parse("skip 0"), parse("skip 3"), parse("repeat 4")
    found = record(
        "q",
        Verdict(True),
        {early: Verdict(True), late: Verdict(True), other: Verdict(True)},
        {late: False},
    )
    assert (
        question_programs(found, 2).valid == (other,)
        and question_programs(found, 2).identity_correct
    )
    assert question_programs(found, 0).valid == (early, other)
    overturned = record("q", Verdict(True), {other: Verdict(True)}, {IDENTITY: False, other: True})
    assert not question_programs(overturned, 2).identity_correct
    confirmed = record("q", Verdict(False), {late: Verdict(False)}, {IDENTITY: True})
    assert question_programs(confirmed, 2).identity_correct


def _searched(name: str, count: int) -> tuple[list[SearchRecord], dict[str, Tensor]]:
    """Questions of even numbers are answered with layer 3 skipped, others with layer 4 repeated; a
    feature tells which.
    """
    generator = torch.Generator().manual_seed(len(name))
    records, features = [], {}
    for i in range(count):
        program = parse("repeat 4") if i % 2 else parse("skip 3")
        records.append(simple(f"{name}{i}", {program, parse("skip 0")}, {parse("skip 5")}))
        states = torch.randn(4, 3, generator=generator) * 0.1
        states[:, 0] += 2.0 * (-1) ** i
        features[f"{name}{i}"] = states
    return records, features


NETWORK = NetworkConfig(DEPTH, 3, width=16, heads=2, blocks=1, dropout=0.0, residual=True)


def test_the_arm_learns_what_is_planted() -> None:
    (train, features), (validation, held_out) = _searched("train", 32), _searched("validation", 8)
    unanswered = simple("none", set(), {parse("skip 5")})
    off = record(
        "off",
        Verdict(True),
        {parse("skip 0"): Verdict(True)},
        {IDENTITY: False, parse("skip 0"): False},
    )
    config = NetworkTraining(learning_rate=5e-3, batch_size=8, epochs=25, seed=1)
    trained, counts = train_polar_arm(
        [*train, unanswered, off], validation, features | held_out, DEPTH, 2, NETWORK, config
    )
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
    again, _ = train_polar_arm(
        [*train, unanswered, off], validation, features | held_out, DEPTH, 2, NETWORK, config
    )
    assert again.history == trained.history


def test_records_and_features_that_do_not_fit_are_refused() -> None:
    train, features = _searched("train", 4)
    with pytest.raises(InputError, match="question 'train0' is in train and in validation"):
        train_polar_arm(train, train[:1], features, DEPTH, 2, NETWORK)
    with pytest.raises(InputError, match="validation question 'train2' has no token features"):
        train_polar_arm(
            train[:2], train[2:], {q: features[q] for q in ("train0", "train1")}, DEPTH, 2, NETWORK
        )
    with pytest.raises(InputError, match="no label rows"):
        train_polar_arm(train, [simple("x", set())], features, DEPTH, 2, NETWORK)


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
        assert program == decode_budget(boundary[0], op[0], 4, exact=False).program
