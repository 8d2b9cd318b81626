"""Training of PoLar's network on labels from searches (PoLar, section 3).

Shapes: N label rows, B rows of a batch, T tokens, Q feature size, D depth. A state file holds a
finished epoch: weights, the best weights so far, the optimizer's moments, and as JSON all the rest.
It is safetensors, so reading one runs no code.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InputError, TrainingError
from .labels import LabelRow, label_losses, label_tensors
from .network import NetworkConfig, PolarNetwork, pad_features
from .training_state import TrainingState, load_state, save_state

__all__ = [
    "LabelledQuestions",
    "NetworkTraining",
    "ScalarWriter",
    "TrainedNetwork",
    "train_network",
]


class ScalarWriter(Protocol):
    """What is used of a TensorBoard SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Record one value."""


@dataclass(frozen=True)
class NetworkTraining:
    """Settings of a training. Raises InputError on a value out of range."""

    learning_rate: float = 1e-3
    """The paper tries 1e-4 to 3e-3."""
    batch_size: int = 128
    """Label rows of a step; the paper tries 32, 128 and 256."""
    epochs: int = 10
    """The paper has 3 or 10."""
    warmup_steps: int = 10
    weight_decay: float = 0.01
    """AdamW's default in PyTorch; the paper states none."""
    patience: int | None = None
    """Stop after so many epochs without a lower validation loss; None never stops early, as in the
    paper.
    """
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (
            ("batch_size", 1),
            ("epochs", 1),
            ("warmup_steps", 0),
            ("patience", 1),
            ("seed", None),
        ):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or (low is not None and value < low)
            ):
                raise InputError(
                    f"{name} is {value!r}; give a whole "
                    f"number{'' if low is None else f' of at least {low}'}"
                )
        for name, allowed in (
            ("learning_rate", self.learning_rate > 0),
            ("weight_decay", self.weight_decay >= 0),
        ):
            value = getattr(self, name)
            if not allowed or not math.isfinite(value):
                raise InputError(
                    f"{name} is {value!r}; give a finite number that is not negative (a learning "
                    "rate: above 0)"
                )

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Of a step, counted from 0: linear warm-up, then half a cosine that ends just above 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        part = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class LabelledQuestions:
    """Questions with their token features, one tensor [T, Q] each, and label rows of them in any
    number and order.

    Raises InputError if ids repeat, numbers differ, there are no rows, or a row's question is not
    there.
    """

    questions: Sequence[str]
    features: Sequence[Tensor]
    rows: Sequence[LabelRow]
    index: Mapping[str, int] = field(init=False, repr=False)
    """Of each question's id."""

    def __post_init__(self) -> None:
        index = {question: i for i, question in enumerate(self.questions)}
        if len(index) < len(self.questions):
            twice = next(q for i, q in enumerate(self.questions) if index[q] != i)
            raise InputError(
                f"question {twice!r} is there twice; give each question and its features once"
            )
        if len(self.features) != len(self.questions):
            raise InputError(
                f"{len(self.questions)} questions but features of {len(self.features)}; give a "
                "tensor each"
            )
        if not self.rows:
            raise TrainingError(
                f"no label rows for {len(self.questions)} questions; search until some program "
                "answers some of them"
            )
        if missing := next((row.question for row in self.rows if row.question not in index), None):
            raise InputError(
                f"a label row is of question {missing!r}, which has no features; give them, or "
                "leave the row out"
            )
        object.__setattr__(self, "index", index)


@dataclass(frozen=True)
class TrainedNetwork:
    """The network of the epoch with the lowest validation loss, in eval mode, and how training
    went, as plain JSON values.

    `history` has `epochs` (a dict of losses each), `best_epoch` (from 1), `best_validation_loss`,
    `steps`, `stopped_early`.
    """

    network: PolarNetwork
    history: dict[str, Any]


def train_network(
    train: LabelledQuestions,
    validation: LabelledQuestions,
    *,
    network_config: NetworkConfig,
    config: NetworkTraining | None = None,
    state_file: str | Path | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
    writer: ScalarWriter | None = None,
    device: str | torch.device = "cpu",
) -> TrainedNetwork:
    """Train a network by AdamW on `train` and choose the epoch by the loss on `validation` (PoLar,
    section 3).

    After each epoch its state goes to `state_file`, its losses to `writer`, and to `progress` as a
    dict. If the file is there, training goes on behind it and ends as if it had never stopped: what
    is random in an epoch depends on the seed and its number alone. The caller's random state stays
    as it is.

    Raises InputError if data and network do not fit, if the state file is damaged or of another
    training, naming what differs, and if the loss stops being finite.
    """
    config = config or NetworkTraining()
    run = _Run(
        train, validation, network_config=network_config, config=config, device=torch.device(device)
    )
    settings = {
        "network": asdict(network_config),
        "training": asdict(config),
        "data": _fingerprint(train, validation),
    }
    path = None if state_file is None else Path(state_file)
    state = (
        TrainingState()
        if path is None or not path.exists()
        else load_state(path, settings, network=run.network, optimizer=run.optimizer)
    )
    while state.epoch < config.epochs and not _is_stale(state, config):
        losses = {"epoch": state.epoch + 1, **run.train_epoch(state.epoch), **run.validate()}
        state.epoch += 1
        state.epochs.append(losses)
        if losses["validation_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = losses["validation_loss"], state.epoch
            state.best = {
                name: value.detach().clone() for name, value in run.network.state_dict().items()
            }
        if writer is not None:
            for name in (name for name in losses if name != "epoch"):
                writer.add_scalar(f"network/{name}", losses[name], state.epoch)
        if path is not None:
            save_state(path, settings, state=state, network=run.network, optimizer=run.optimizer)
        if progress is not None:
            progress(dict(losses))
    run.network.load_state_dict(state.best)
    history = {
        "epochs": [dict(each) for each in state.epochs],
        "best_epoch": state.best_epoch,
        "best_validation_loss": state.best_loss,
        "steps": state.epoch * run.steps_per_epoch,
        "stopped_early": state.epoch < config.epochs,
    }
    return TrainedNetwork(run.network.eval(), history)


class _Run:
    """A network with its optimizer and data."""

    def __init__(
        self,
        train: LabelledQuestions,
        validation: LabelledQuestions,
        *,
        network_config: NetworkConfig,
        config: NetworkTraining,
        device: torch.device,
    ) -> None:
        for name, data in (("train", train), ("validation", validation)):
            _check_fits(name, data, config=network_config)
        self.config, self.device = config, device
        self.train, self.validation = train, validation
        self.targets = {id(data): label_tensors(data.rows) for data in (train, validation)}
        self.steps_per_epoch = math.ceil(len(train.rows) / config.batch_size)
        with _seeded(config.seed, "weights", device=device):
            self.network = PolarNetwork(network_config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training rows, in an order of the epoch's own."""
        self.network.train()
        num_steps = self.config.epochs * self.steps_per_epoch
        # Divided by the mean over all rows, not the batch's: else a row would weigh more where its
        # batch is light, and questions would not weigh the same.
        weight = self.targets[id(self.train)][2].mean().item()
        sums, rate = torch.zeros(3, dtype=torch.float64), 0.0
        with _seeded(self.config.seed, f"epoch {epoch}", device=self.device):
            order = torch.randperm(len(self.train.rows))
            for index, rows in enumerate(order.split(self.config.batch_size)):
                rate = self.config.learning_rate_at(epoch * self.steps_per_epoch + index, num_steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                boundary, op = self._losses(self.train, rows.tolist())
                loss = (boundary + op) / (weight * len(rows))
                if not bool(loss.isfinite()):
                    raise InputError(
                        f"the loss is {loss.item()} in epoch {epoch + 1}, step {index + 1}; lower "
                        f"the learning rate ({self.config.learning_rate})"
                    )
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                sums += torch.stack([boundary + op, boundary, op]).detach().cpu()
        return {"learning_rate": rate, **self._means("train", sums, data=self.train)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on the validation rows."""
        self.network.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for rows in torch.arange(len(self.validation.rows)).split(self.config.batch_size):
            boundary, op = self._losses(self.validation, rows.tolist())
            sums += torch.stack([boundary + op, boundary, op]).cpu()
        if not bool(sums.isfinite().all()):
            raise InputError(
                "the validation loss is not finite; lower the learning rate "
                f"({self.config.learning_rate})"
            )
        return self._means("validation", sums, data=self.validation)

    def _losses(self, data: LabelledQuestions, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Weighted boundary and op loss, summed over the rows."""
        # Rows of one question in a batch share its forward pass.
        questions = [data.index[data.rows[row].question] for row in rows]
        distinct = list(dict.fromkeys(questions))
        place = {question: i for i, question in enumerate(distinct)}
        features, mask = pad_features([data.features[question] for question in distinct])
        boundary_logits, op_logits = self.network(features.to(self.device), mask.to(self.device))
        pick = torch.tensor([place[question] for question in questions], device=self.device)
        boundaries, ops, weights = (each[rows].to(self.device) for each in self.targets[id(data)])
        boundary, op = label_losses(
            boundary_logits[pick], op_logits[pick], boundaries=boundaries, ops=ops
        )
        return (weights * boundary).sum(), (weights * op).sum()

    def _means(self, name: str, sums: Tensor, *, data: LabelledQuestions) -> dict[str, float]:
        total, boundary, op = (sums / self.targets[id(data)][2].double().sum()).tolist()
        return {f"{name}_loss": total, f"{name}_boundary_loss": boundary, f"{name}_op_loss": op}


def _is_stale(state: TrainingState, config: NetworkTraining) -> bool:
    return config.patience is not None and state.epoch - state.best_epoch >= config.patience


def _check_fits(name: str, data: LabelledQuestions, *, config: NetworkConfig) -> None:
    for row in data.rows:
        if row.program.depth != config.depth:
            raise InputError(
                f"a {name} row of question {row.question!r} is of {row.program.depth} layers, the "
                f"network of {config.depth}; build it for the depth of the model that was searched"
            )
        if max(row.labels.ops) >= config.ops:
            raise InputError(
                f"a {name} row of question {row.question!r} runs a segment {max(row.labels.ops)} "
                f"times, but the network's repeat_times is {config.repeat_times}; give both the "
                "same repeat_times"
            )
    for question, features in zip(data.questions, data.features, strict=True):
        if features.dim() != 2 or features.shape[1] != config.feature_size:
            raise InputError(
                f"{name} features of question {question!r} have shape {list(features.shape)}; give"
                f" [tokens, {config.feature_size}], or build the network for another feature_size"
            )


def _seeded(seed: int, purpose: str, *, device: torch.device) -> "_Seeded":
    return _Seeded(
        int.from_bytes(hashlib.sha256(f"{seed}\n{purpose}".encode()).digest()[:7]), device
    )


class _Seeded:
    """A stretch of code with random numbers of its own; the caller's are as before afterwards."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        devices = (
            [torch.cuda.current_device() if device.index is None else device.index]
            if device.type == "cuda"
            else []
        )
        self._fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


def _fingerprint(*data: LabelledQuestions) -> str:
    """Of ids, rows and features: 64 hex digits."""
    digest = hashlib.sha256()
    for each in data:
        rows = [
            (row.question, str(row.program), row.labels.boundaries, row.labels.ops, row.weight)
            for row in each.rows
        ]
        digest.update(json.dumps([list(each.questions), rows]).encode())
        for features in each.features:
            # Shape and sum, not every number: they tell another encoder, and features may be
            # gigabytes.
            digest.update(
                json.dumps([list(features.shape), features.double().sum().item()]).encode()
            )
    return digest.hexdigest()
