"""PoLar's network: its size, what it looks at, and its training on toy questions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polar_fx.errors import InputError
from polar_fx.evaluation.polar.decode import decode_beam
from polar_fx.evaluation.polar.labels import (
    LabelRow,
    QuestionPrograms,
    label_losses,
    label_rows,
    label_tensors,
    parse_labels,
)
from polar_fx.evaluation.polar.network import NetworkConfig, PolarNetwork, pad_features
from polar_fx.evaluation.polar.training import (
    LabelledQuestions,
    NetworkTraining,
    TrainedNetwork,
    train_network,
)
from polar_fx.program import Program

SIZES: dict[str, Any] = dict(depth=5, feature_size=6, width=8, heads=2, blocks=1, dropout=0.1)
PROGRAMS = [
    Program.from_path(path, 5)
    for path in ([0, 1, 2, 3], [0, 1, 2, 3, 4, 4], [0, 2, 3, 4], [0, 1, 1, 2, 3, 4])
]


def network(**settings) -> PolarNetwork:
    torch.manual_seed(0)
    return PolarNetwork(NetworkConfig(**{**SIZES, **settings})).eval()


def tokens(*lengths: int, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, size, generator=generator) for length in lengths]


# The network


@pytest.mark.parametrize("depth, parameters", [(24, 2_112_260), (36, 2_115_332)])
def test_parameters_are_the_papers(depth: int, parameters: int) -> None:
    assert PolarNetwork(NetworkConfig(depth, 1024)).num_parameters == parameters
    assert PolarNetwork(NetworkConfig(depth, 1024, residual=True)).num_parameters == parameters
    assert (
        PolarNetwork(NetworkConfig(depth, 1024, repeat_times=4)).num_parameters
        == parameters + 2 * 257
    )


def test_forward_by_hand() -> None:
    """Written out with matrix products, for one question; post-norm blocks, ReLU, no residual
    around cross-attention.
    """
    net, (question,) = network(blocks=2), tokens(3)
    weights = dict(net.named_parameters())

    def attend(name: str, queries: Tensor, *, keys: Tensor) -> Tensor:
        w, b = weights[f"{name}.in_proj_weight"].chunk(3), weights[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (
            (x @ w[i].T + b[i]).unflatten(-1, (2, 4)).transpose(0, 1)
            for i, x in enumerate((queries, keys, keys))
        )
        mixed = (q @ k.transpose(1, 2) / math.sqrt(4)).softmax(-1) @ v
        return linear(f"{name}.out_proj", mixed.transpose(0, 1).flatten(1))

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = attend(
        "cross_attention", weights["layer_queries"], keys=linear("token_projection", question)
    )
    for i in range(2):
        x = norm(f"blocks.{i}.norm1", x + attend(f"blocks.{i}.self_attn", x, keys=x))
        x = norm(
            f"blocks.{i}.norm2",
            x + linear(f"blocks.{i}.linear2", linear(f"blocks.{i}.linear1", x).relu()),
        )
    boundary_logits, op_logits = net(*pad_features([question]))
    torch.testing.assert_close(boundary_logits, linear("boundary_head", x).T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(op_logits, linear("op_head", x)[None], atol=1e-5, rtol=1e-4)
    assert boundary_logits.shape == (1, 5) and op_logits.shape == (1, 5, 3)


def test_padding_is_not_looked_at() -> None:
    net, questions = network(), tokens(2, 7, 1)
    features, mask = pad_features(questions)
    assert mask.sum(1).tolist() == [2, 7, 1] and features.shape == (3, 7, 6)
    together = net(features, mask)
    torch.testing.assert_close(
        together, net(features.masked_fill(~mask.unsqueeze(-1), math.nan), mask)
    )
    for row, question in enumerate(questions):
        alone = net(*pad_features([question]))
        for of_all, of_one in zip(together, alone, strict=True):
            torch.testing.assert_close(of_all[row], of_one[0], atol=1e-5, rtol=1e-4)
    changed = features.clone()
    changed[1, 6] += 1
    assert not torch.allclose(net(changed, mask)[0][1], together[0][1])


def test_one_token_tells_layers_apart_only_with_a_residual() -> None:
    question = pad_features(tokens(1))
    plain, residual = network()(*question)[1], network(residual=True)(*question)[1]
    torch.testing.assert_close(plain, plain[:, :1].expand_as(plain))
    assert (residual - residual[:, :1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f, m: (f, m & torch.tensor([[True], [False]])), "row 1 of the mask"),
        (
            lambda f, m: (f.index_fill(1, torch.tensor([1]), math.nan), m),
            "row 0, token 1 are not all finite",
        ),
        (lambda f, m: (f[..., :5], m), r"\[2, 3, 5\].*another feature_size"),
        (lambda f, m: (f.long(), m), "int64"),
        (lambda f, m: (f, m.long()), "mask is int64"),
        (lambda f, m: (f, m[:, :2]), r"mask is bool \[2, 2\]"),
    ],
)
def test_bad_features(change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        network()(*change(*pad_features(tokens(3, 2))))


@pytest.mark.parametrize(
    "bad", [[], [torch.zeros(0, 6)], [torch.zeros(2, 6), torch.zeros(2, 5)], [torch.zeros(6)]]
)
def test_bad_questions(bad: list[Tensor]) -> None:
    with pytest.raises(InputError):
        pad_features(bad)


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 0},
        {"width": 9},
        {"dropout": 1.0},
        {"repeat_times": 1},
        {"blocks": True},
        {"feature_size": 1.0},
    ],
)
def test_bad_sizes(settings: dict) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        NetworkConfig(**{**SIZES, **settings})


# Training


def labelled(count: int, first: int = 0, *, size: int = 6) -> LabelledQuestions:
    """Questions of four kinds, each with its program; the kind shows in which feature is large."""
    features = tokens(*([2, 3] * count), size=size)[:count]
    found = []
    for i, each in enumerate(features):
        each *= 0.1
        each[:, i % 4] += 2
        found.append(QuestionPrograms(f"q{first + i}", i % 8 == 0, (PROGRAMS[i % 4],)))
    return LabelledQuestions([each.question for each in found], features, label_rows(found, 5).rows)


TRAIN, VALIDATION = labelled(16), labelled(8, first=100)
NETWORK = NetworkConfig(**{**SIZES, "residual": True})
QUICK = NetworkTraining(learning_rate=3e-3, batch_size=8, epochs=4)


def toy_training(config: NetworkTraining, **more: Any) -> TrainedNetwork:
    return train_network(TRAIN, VALIDATION, network_config=NETWORK, config=config, **more)


def same_weights(a: PolarNetwork, b: PolarNetwork) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_training_learns_which_program_a_question_takes() -> None:
    trained = toy_training(
        NetworkTraining(learning_rate=2e-2, batch_size=8, epochs=40),
    )
    losses = [each["validation_loss"] for each in trained.history["epochs"]]
    assert min(losses) < 0.3 < losses[0] and trained.history["best_validation_loss"] == min(losses)
    assert trained.history["best_epoch"] == losses.index(min(losses)) + 1
    assert (
        trained.history["steps"] == 40 * 3
        and not trained.history["stopped_early"]
        and not trained.network.training
    )
    with torch.no_grad():
        boundary_logits, op_logits = trained.network(*pad_features(VALIDATION.features))
    for i in range(8):
        assert decode_beam(boundary_logits[i], op_logits[i])[0].program == PROGRAMS[i % 4]


def test_the_network_returned_is_the_best_one() -> None:
    trained = toy_training(
        NetworkTraining(learning_rate=0.3, batch_size=8, epochs=6),
    )
    assert trained.history["best_epoch"] < 6
    with torch.no_grad():
        index = [VALIDATION.index[row.question] for row in VALIDATION.rows]
        boundary, op = trained.network(*pad_features([VALIDATION.features[i] for i in index]))
    boundaries, ops, weights = label_tensors(VALIDATION.rows)
    losses = label_losses(boundary, op, boundaries=boundaries, ops=ops)
    loss = (weights * sum(losses)).sum() / weights.sum()
    assert loss.item() == pytest.approx(trained.history["best_validation_loss"], rel=1e-4)


def test_a_seed_gives_the_same_network_and_leaves_the_callers_numbers() -> None:
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    first = toy_training(QUICK)
    assert torch.rand(1) == want
    again = toy_training(QUICK)
    assert same_weights(first.network, again.network) and first.history == again.history
    other = toy_training(
        NetworkTraining(**{**vars(QUICK), "seed": 1}),
    )
    assert not same_weights(first.network, other.network)


def test_each_epoch_sees_every_row_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(features: list[Tensor]) -> tuple[Tensor, Tensor]:
        places = {id(known): i for i, known in enumerate(data.features)}
        seen.extend(places[id(each)] for each in features)
        return pad_features(features)

    data = LabelledQuestions(
        TRAIN.questions, TRAIN.features, [row for row in TRAIN.rows if not row.program.is_identity]
    )
    monkeypatch.setattr("polar_fx.evaluation.polar.training.pad_features", spy)
    train_network(
        data, data, network_config=NETWORK, config=NetworkTraining(batch_size=8, epochs=3)
    )
    # training, validation, training ...
    passes = [seen[i : i + 16] for i in range(0, len(seen), 16)]
    assert len(passes) == 6 and all(sorted(each) == list(range(16)) for each in passes)
    assert passes[1] == passes[3] == passes[5] == list(range(16))
    assert passes[0] != passes[2] != passes[4] != passes[0] and passes[0] != passes[1]


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_training_goes_on_where_it_was_stopped(tmp_path: Path, after: int) -> None:
    file, seen = tmp_path / "runs" / "state.safetensors", []

    def progress(losses: dict[str, float]) -> None:
        seen.append(losses["epoch"])
        if seen == [*range(1, after + 1)]:
            raise Stop

    whole = toy_training(QUICK)
    with pytest.raises(Stop):
        toy_training(
            QUICK,
            state_file=file,
            progress=progress,
        )
    resumed = toy_training(QUICK, state_file=file, progress=progress)
    assert seen == [1, 2, 3, 4]
    assert same_weights(whole.network, resumed.network) and whole.history == resumed.history
    assert [each.name for each in file.parent.iterdir()] == ["state.safetensors"]


def test_a_state_file_that_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "state"
    toy_training(QUICK, state_file=file)
    good = file.read_bytes()
    with pytest.raises(InputError, match=r"training\.epochs is 4 there and 5 here"):
        toy_training(
            NetworkTraining(**{**vars(QUICK), "epochs": 5}),
            state_file=file,
        )
    with pytest.raises(InputError, match=r"network\.residual"):
        train_network(
            TRAIN, VALIDATION, network_config=NetworkConfig(**SIZES), config=QUICK, state_file=file
        )
    with pytest.raises(InputError, match="data is"):
        train_network(VALIDATION, TRAIN, network_config=NETWORK, config=QUICK, state_file=file)
    assert file.read_bytes() == good
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        toy_training(QUICK, state_file=file)
    file.write_bytes(good)
    save_file(load_file(file), file)  # without what the header tells
    with pytest.raises(InputError, match="not a training state"):
        toy_training(QUICK, state_file=file)


def test_a_write_that_fails_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = tmp_path / "state", []

    def progress(_: dict[str, float]) -> None:
        before.append(file.read_bytes())
        monkeypatch.setattr("os.replace", fail)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        toy_training(
            QUICK,
            state_file=file,
            progress=progress,
        )
    assert [file.read_bytes()] == before and list(tmp_path.iterdir()) == [file]


def test_early_stopping() -> None:
    config = NetworkTraining(learning_rate=1.0, batch_size=8, epochs=50, patience=2)
    history = toy_training(config).history
    assert history["stopped_early"] and len(history["epochs"]) == history["best_epoch"] + 2 < 50


def test_learning_rates_by_hand() -> None:
    config = NetworkTraining(learning_rate=1.0)
    rates = [config.learning_rate_at(step, 30) for step in range(30)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates[20] == pytest.approx(0.5) and 0 < rates[29] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert NetworkTraining(warmup_steps=0).learning_rate_at(0, 1) == 1e-3
    history = toy_training(QUICK).history
    # 18 rows are 3 steps
    assert history["epochs"][0]["learning_rate"] == pytest.approx(QUICK.learning_rate * 0.3)


def test_the_writer_gets_every_loss() -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: dict[tuple[str, int], float] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.seen[tag, global_step] = scalar_value

    writer = Writer()
    history = toy_training(QUICK, writer=writer).history
    for each in history["epochs"]:
        epoch = each.pop("epoch")
        assert each == {
            tag.removeprefix("network/"): value
            for (tag, step), value in writer.seen.items()
            if step == epoch
        }
        assert each["train_loss"] == pytest.approx(
            each["train_boundary_loss"] + each["train_op_loss"]
        )


def test_rows_count_by_their_weight() -> None:
    """Of two programs of every question the one that weighs nearly all is learnt, however often the
    other occurs.
    """
    rows = [
        LabelRow(q, program, parse_labels(program), weight)
        for q in TRAIN.questions
        for program, weight in [(PROGRAMS[0], 1.0), *[(PROGRAMS[1], 1e-4)] * 3]
    ]
    data = LabelledQuestions(TRAIN.questions, TRAIN.features, rows)
    trained = train_network(
        data,
        data,
        network_config=NETWORK,
        config=NetworkTraining(learning_rate=1e-2, batch_size=8, epochs=15),
    )
    with torch.no_grad():
        boundary_logits, op_logits = trained.network(*pad_features(TRAIN.features[:1]))
    assert decode_beam(boundary_logits[0], op_logits[0])[0].program == PROGRAMS[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: LabelledQuestions(["a"], tokens(1, 1), TRAIN.rows),
            "1 questions but features of 2",
        ),
        (lambda: LabelledQuestions(["a", "a"], tokens(1, 1), TRAIN.rows), "'a' is there twice"),
        (lambda: LabelledQuestions(["a"], tokens(1), TRAIN.rows), "'q0', which has no features"),
        (lambda: LabelledQuestions(["a"], tokens(1), ()), "no label rows"),
        (
            lambda: train_network(
                TRAIN, VALIDATION, network_config=NetworkConfig(**{**SIZES, "depth": 4})
            ),
            "of 5 layers, the network of 4",
        ),
        (
            lambda: train_network(TRAIN, labelled(4, size=7), network_config=NETWORK),
            r"validation features of question 'q0'.*\[2, 7\]",
        ),
        (
            lambda: toy_training(
                NetworkTraining(learning_rate=1e30),
            ),
            "lower the learning rate",
        ),
        (lambda: NetworkTraining(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: NetworkTraining(batch_size=0), "batch_size is 0"),
        (lambda: NetworkTraining(patience=0), "patience is 0"),
    ],
)
def test_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_more_repeats_than_the_network_has_classes_for() -> None:
    thrice = Program.from_path([0, 1, 1, 1, 2, 3, 4], 5)
    rows = label_rows([QuestionPrograms("q", False, (thrice,))], 5, repeat_times=3).rows
    data = LabelledQuestions(["q"], tokens(2), rows)
    with pytest.raises(InputError, match="runs a segment 3 times"):
        train_network(data, data, network_config=NETWORK, config=QUICK)
    trained = train_network(
        data, data, network_config=NetworkConfig(**{**SIZES, "repeat_times": 3}), config=QUICK
    )
    assert trained.network(*pad_features(tokens(2)))[1].shape == (1, 5, 4)
