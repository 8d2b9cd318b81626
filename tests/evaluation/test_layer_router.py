"""Per-layer routers: windows, labels and losses by hand, and that they learn what is planted."""

import math
from operator import attrgetter
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from polar_fx.errors import InputError
from polar_fx.evaluation import layer_router as routers
from polar_fx.evaluation.layer_router import (
    OPS,
    SKIP_OPS,
    LayerRouter,
    RouterConfig,
    RouterNetwork,
    train_layer_router,
)
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.runtime.trunk import shares_trunk
from search_samples import record, simple

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
        "q",
        Verdict(False),
        explored={parse("skip 4"): Verdict(True), parse("skip 2"): Verdict(True)},
    )
    assert routers.best_program(equal, 2) == parse("skip 4")
    again = record("q", Verdict(True), explored={shorter: Verdict(True)}, verified={shorter: False})
    assert routers.best_program(again, 2) == IDENTITY
    again = record(
        "q",
        Verdict(True),
        explored={shorter: Verdict(True)},
        verified={shorter: False, IDENTITY: False},
    )
    assert routers.best_program(again, 2) is None


def test_router_labels_by_hand() -> None:
    records = [
        simple("a", {parse("skip 3")}, baseline=True),
        simple("b", {parse("repeat 4 x3")}),
        simple("c", set(), wrong={parse("skip 3")}),
        simple("d", {parse("repeat 3-4")}),
        simple("e", set(), baseline=True),
        simple("f", {Program.from_path([0, 1, 3, 2, 4], DEPTH)}),
        simple("g", {parse("repeat 5")}),
    ]
    labels = routers.router_labels(records, DEPTH, num_steps=2)
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
        routers.router_labels(records, 8, num_steps=2)
    with pytest.raises(InputError, match="leaves nothing to decide"):
        routers.router_labels(records, DEPTH, num_steps=DEPTH)
    assert routers.router_labels([simple("c", set())], DEPTH, num_steps=2).classes.shape == (0, 4)


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
    found = routers.focal_loss(scores, torch.tensor([[0, 2]]), weights=weights)
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
    network = RouterNetwork(5, 2, num_classes=3, width=4)
    windows = torch.randn(3, 8, 5)
    network.standardize_by(windows)
    flat = windows.flatten(0, 1)
    seen = (windows - flat.mean(0)) / flat.std(0, correction=0)
    w1, b1, w2, b2 = network.layers[1].parameters()
    expected = (torch.nn.functional.gelu(seen @ w1.T + b1) @ w2.T + b2).mean(1)
    assert torch.allclose(network(windows)[:, 1], expected, atol=1e-5)


def _trained(
    train: tuple[torch.Tensor, ...], validation: tuple[torch.Tensor, ...], **options: Any
) -> tuple[LayerRouter, dict[str, Any]]:
    """A router after two steps, of windows and classes to train and to validate with."""
    return train_layer_router(
        *train,
        validation_windows=validation[0],
        validation_classes=validation[1],
        num_steps=2,
        **options,
    )


def test_a_router_learns_what_is_planted_and_nothing_else() -> None:
    train, validation, test = planted(64, 0), planted(32, 1), planted(40, 2)
    router, history = _trained(train, validation, config=CONFIG)
    assert router.depth == DEPTH and router.classes(test[0]).equal(test[1])
    for program, classes in zip(router.programs(test[0]), test[1].tolist(), strict=True):
        assert program == routers.program_of(classes, 2) and shares_trunk(program, 2)
    assert history["class_counts"] == torch.bincount(train[1].flatten(), minlength=3).tolist()
    assert history["validation_loss"] == min(each["validation"] for each in history["history"])
    # a gate counts every run as one
    gate, of_gate = _trained(train, validation, ops=SKIP_OPS, config=CONFIG)
    assert len(of_gate["class_counts"]) == 2 and gate.classes(test[0]).equal(test[1].clamp(max=1))
    # with the labels of other questions there is nothing to learn, and the validation loss says so
    shuffled = train[1][torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    _, nothing = _trained((train[0], shuffled), validation, config=CONFIG)
    assert history["validation_loss"] < 0.2 * nothing["validation_loss"]


def test_training_is_deterministic_and_leaves_random_state() -> None:
    train, validation = planted(24, 0), planted(12, 1)
    config = RouterConfig(width=4, epochs=3, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, first = _trained(train, validation, config=config)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    two, second = _trained(train, validation, config=config)
    other, _ = _trained(train, validation, config=RouterConfig(width=4, epochs=3, seed=6))
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
        windows,
        classes,
        validation_windows=windows,
        validation_classes=wrong,
        num_steps=2,
        config=config,
        progress=lambda e, _: seen.append(e),
    )
    assert history["best_epoch"] + 4 == seen[-1] < 50
    found = routers.focal_loss(
        router.network(windows), wrong, weights=torch.tensor(history["class_weights"])
    ).item()
    assert found == pytest.approx(history["validation_loss"])


class Fixed(RouterNetwork):
    """Scores that are the first window."""

    def __init__(self, layers: int, classes: int) -> None:
        super().__init__(layers * classes, layers, num_classes=classes, width=1)
        self.shape = layers, classes

    def forward(self, windows: Tensor) -> Tensor:
        return windows[:, 0].unflatten(-1, self.shape)


def _skip_scores(chances: list[list[float]]) -> Tensor:
    skip = torch.tensor(chances)
    return torch.stack([skip.log(), (1 - skip).log()], dim=-1).flatten(1)[:, None]


def test_threshold_meets_a_budget_with_the_fewest_skips() -> None:
    windows = _skip_scores([[0.1, 0.6, 0.7], [0.2, 0.3, 0.8]])
    gate = LayerRouter(Fixed(3, 2), 3, ops=SKIP_OPS)
    assert [str(p) for p in gate.programs(windows)] == ["0-3 /6", "0-4 /6"]  # P(skip) above 1/2

    def steps(budget: float) -> list[int]:
        return [p.num_steps for p in gate.with_budget(windows, budget).programs(windows)]

    assert [steps(mean / 6) for mean in (6, 5.5, 5, 4.4)] == [[6, 6], [6, 5], [5, 5], [4, 4]]
    # no row can be skipped altogether: at 0.2 the second would be the identity again
    with pytest.raises(InputError, match=r"below 4.00 of 6 steps.*asks for 3.90"):
        gate.with_budget(windows, 0.65)


def test_threshold_is_exact_on_random_chances() -> None:
    chances = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)).tolist()
    windows, gate = _skip_scores(chances), LayerRouter(Fixed(4, 2), 1, ops=SKIP_OPS)
    levels = sorted(
        {math.inf, *gate.probabilities(windows)[..., 0].flatten().tolist()}, reverse=True
    )
    chosen = [
        LayerRouter(gate.network, 1, ops=SKIP_OPS, threshold=level).programs(windows)
        for level in levels
    ]
    means = [fmean(map(attrgetter("num_steps"), programs)) for programs in chosen]
    for budget in (1.0, 0.9, 0.8, 0.7):
        expected = next(
            level for level, mean in zip(levels, means, strict=True) if mean <= budget * 5 + 1e-9
        )
        assert gate.with_budget(windows, budget).threshold == expected


def test_a_threshold_leaves_repeats() -> None:
    scores = torch.tensor([[[0.5, 0.2, 0.3], [0.3, 0.6, 0.1]]]).log().flatten(1)[:, None]
    assert LayerRouter(Fixed(2, 3), 1, ops=OPS, threshold=0.6).classes(scores).tolist() == [[2, 1]]
    assert LayerRouter(Fixed(2, 3), 1, ops=OPS, threshold=0.29).classes(scores).tolist() == [[0, 0]]
    with pytest.raises(InputError, match="needs a router with ops"):
        LayerRouter(Fixed(2, 3), 1, ops=OPS).with_budget(scores, 0.5)


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
            _trained(data[:2], data[2:])
    with pytest.raises(InputError, match="ops of a router"):
        train_layer_router(
            windows,
            classes,
            validation_windows=windows,
            validation_classes=classes,
            num_steps=2,
            ops=("execute", "repeat"),
        )
