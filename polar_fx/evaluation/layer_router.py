"""A router for each layer, after Dr.LLM (arXiv 2510.12773), and a skip gate after MindSkip (arXiv
2410.13184).

From Dr.LLM: a Linear-GELU-Linear network of width 128 a layer, hidden states pooled in 8 windows,
scores averaged over windows, classes skip, execute and repeat, focal loss (gamma 2) with
class-balanced weights (beta 0.999).

What differs. There, a router sees the input of its own layer, so every layer before it must have
run. Here all routers see the hidden states after the trunk, and all decisions are taken at once,
before the rest runs: a program is known in advance, and trunk and features are those of the other
predictors. States are standardized, because those of early layers differ in scale by orders of
magnitude. Labels come from our searches, not from theirs.

MindSkip's gates (Router-Tuning) turn off the attention of a layer, for a sequence or a token, and
are trained through the frozen model on text. Here a gate turns off a whole layer, learns from the
programs a search found, and a threshold set on validation makes the mean number of steps meet a
budget.

Shape legend: N questions, T tokens, d hidden size, W windows, L layers after the trunk, C classes.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, TrainingError
from ..program import Program
from ..runtime.trunk import shares_trunk
from ..search.records.records import SearchRecord
from ..training.early_stopping import check_ranges, train_to_best

OPS = ("skip", "execute", "repeat")
SKIP_OPS = OPS[:2]
NUM_WINDOWS = 8


def pool_windows(hidden: Tensor, num_windows: int = NUM_WINDOWS) -> Tensor:
    """Means f32[W, d] of consecutive windows of the states [T, d].

    Windows differ by one token at most, and each token is in one; of fewer tokens than windows,
    some are in several. (Dr.LLM leaves the last T mod W tokens out.) Raises InputError if there is
    no token.
    """
    if hidden.dim() != 2 or not len(hidden):
        raise InputError(
            f"hidden states have shape {list(hidden.shape)}; give [tokens, hidden size] with at "
            "least one token"
        )
    if num_windows < 1:
        raise InputError(f"num_windows is {num_windows}; give at least 1")
    edges = [i * len(hidden) // num_windows for i in range(num_windows + 1)]
    return torch.stack(
        [hidden[a : max(b, a + 1)].float().mean(0) for a, b in itertools.pairwise(edges)]
    )


# ------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True, eq=False)
class RouterLabels:
    """`classes` i64[N, L]: how often each layer after the trunk runs in a question's `program`, two
    meaning two or more.

    `unanswered` counts questions no usable program answers; they have no row. `inexact` counts rows
    whose program the classes do not give back: layers in another order, repeats of several layers
    together, or more than two runs.
    """

    questions: tuple[str, ...]
    programs: tuple[Program, ...]
    classes: Tensor
    unanswered: int
    inexact: int


def right_programs(record: SearchRecord, num_steps: int) -> tuple[bool, tuple[Program, ...]]:
    """Whether the identity is right, and the explored programs that are and share the trunk.

    Second verdicts count.
    """
    return record.identity_correct, tuple(p for p in record.valid if shares_trunk(p, num_steps))


def best_program(record: SearchRecord, num_steps: int) -> Program | None:
    """The shortest right program without damping that shares the trunk; the identity if it is right
    and none is shorter.

    Of equally short ones the first explored. None if there is none.
    """
    identity_right, programs = right_programs(record, num_steps)
    found = ([Program.identity(record.depth)] if identity_right else []) + [
        p for p in programs if not p.blends
    ]
    return min(found, key=lambda p: p.num_steps, default=None)


def router_labels(records: Iterable[SearchRecord], depth: int, *, num_steps: int) -> RouterLabels:
    """The labels of every question that a usable program answers.

    Raises InputError for records of another depth.
    """
    _check_trunk(depth, num_steps)
    questions: list[str] = []
    programs: list[Program] = []
    classes: list[list[int]] = []
    unanswered = inexact = 0
    for record in records:
        if record.depth != depth:
            raise InputError(
                f"the record of question {record.question.id!r} has depth {record.depth}, not "
                f"{depth}"
            )
        program = best_program(record, num_steps)
        if program is None:
            unanswered += 1
            continue
        row = [min(program.path.count(layer), 2) for layer in range(num_steps, depth)]
        questions.append(record.question.id)
        programs.append(program)
        classes.append(row)
        inexact += program_of(row, num_steps) != program
    rows = torch.tensor(classes, dtype=torch.int64).reshape(len(classes), depth - num_steps)
    return RouterLabels(tuple(questions), tuple(programs), rows, unanswered, inexact)


def program_of(classes: Iterable[int], num_steps: int) -> Program:
    """The program that runs the trunk and then each layer so often, runs of one layer side by side.

    If nothing would run after the trunk, it is the identity.
    """
    times = list(classes)
    depth = num_steps + len(times)
    behind = [layer for layer, count in enumerate(times, num_steps) for _ in range(count)]
    return (
        Program.from_path([*range(num_steps), *behind], depth)
        if behind
        else Program.identity(depth)
    )


# --------------------------------------------------------------------------------------------- loss


def class_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """Class-balanced weights f32[C] of class counts [C]: (1 - beta) / (1 - beta^n), scaled to a
    mean of 1 (arXiv 1901.05555).

    Classes that do not occur have weight 0 and do not count in the mean. Raises InputError if none
    occurs.
    """
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}; give a number from 0 to below 1")
    present = counts > 0
    if not bool(present.any()):
        raise TrainingError("no class occurs; give labels of at least one question")
    counts = counts.double()
    weights = torch.where(present, (1 - beta) / (1 - beta ** counts.clamp_min(1)), 0.0)
    return (weights * present.sum() / weights.sum()).float()


def focal_loss(scores: Tensor, classes: Tensor, *, weights: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean over questions and layers of -w_y (1 - p_y)^gamma log p_y (arXiv 1708.02002).

    Scores [N, L, C], classes i64[N, L], weights [C].
    """
    log_p = scores.log_softmax(-1).gather(-1, classes[..., None])[..., 0]
    return -(weights[classes] * (1 - log_p.exp()) ** gamma * log_p).mean()


# ----------------------------------------------------------------------------------------- networks


class RouterNetwork(nn.Module):
    """Windows f32[N, W, d] -> scores f32[N, L, C]: a Linear-GELU-Linear network a layer, its scores
    averaged over windows.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, hidden_size: int, num_layers: int, *, num_classes: int, width: int = 128
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, num_classes))
            for _ in range(num_layers)
        )

    def forward(self, windows: Tensor) -> Tensor:
        seen = (windows - self.mean) * self.scale
        return torch.stack([layer(seen).mean(-2) for layer in self.layers], dim=-2)

    @torch.no_grad()
    def standardize_by(self, windows: Tensor) -> None:
        """Take mean and deviation of these windows f32[N, W, d]."""
        flat = windows.flatten(0, 1)
        self.mean.copy_(flat.mean(0))
        self.scale.copy_(1 / flat.std(0, correction=0).clamp_min(1e-6))


class LayerRouter:
    """A trained router: one program a question, in a single shot.

    With `threshold`, a layer is skipped where P(skip) is at least that, and otherwise its likeliest
    other class counts; without, the likeliest class counts. `num_steps` layers of the trunk always
    run.
    """

    def __init__(
        self,
        network: RouterNetwork,
        num_steps: int,
        *,
        ops: tuple[str, ...],
        threshold: float | None = None,
    ) -> None:
        self.network, self.num_steps, self.ops, self.threshold = (
            network.eval(),
            num_steps,
            ops,
            threshold,
        )

    @property
    def depth(self) -> int:
        return self.num_steps + len(self.network.layers)

    @torch.no_grad()
    def probabilities(self, windows: Tensor) -> Tensor:
        """P(class) f32[N, L, C] of windows f32[N, W, d].

        Raises InputError on windows of another size, or not finite.
        """
        _check_windows(windows, len(self.network.mean))
        return self.network(windows).softmax(-1)

    def classes(self, windows: Tensor) -> Tensor:
        """The decisions i64[N, L]. Raises as `probabilities`."""
        chances = self.probabilities(windows)
        if self.threshold is None:
            return chances.argmax(-1)
        other = chances[..., 1:].argmax(-1) + 1
        return other.where(chances[..., 0] < self.threshold, 0)

    def programs(self, windows: Tensor) -> list[Program]:
        """A program a question; the identity where nothing would run after the trunk.

        Raises as `probabilities`.
        """
        return [program_of(row, self.num_steps) for row in self.classes(windows).tolist()]

    def with_budget(self, windows: Tensor, budget: float) -> "LayerRouter":
        """The same router with the highest threshold at which the mean steps on these windows are
        at most budget x depth.

        The windows are those of validation questions. Raises InputError if the router can repeat (a
        threshold alone then does not tell its steps), for a budget outside (0, 1], and if no
        threshold meets it.
        """
        if self.ops != SKIP_OPS:
            raise InputError(
                f"a budget needs a router with ops {SKIP_OPS}, this one has {self.ops}; train one "
                "with them"
            )
        if not 0 < budget <= 1:
            raise InputError(
                f"budget is {budget}; give a fraction of the identity's steps, above 0 and at "
                "most 1"
            )
        skip = self.probabilities(windows)[..., 0]
        # Inf skips nothing. A row whose smallest P(skip) reaches the threshold would skip all, and
        # runs the identity.
        levels = torch.cat([torch.tensor([torch.inf]), skip.unique().flip(0)])
        smallest = skip.min(1).values.sort().values
        skipped = skip.numel() - torch.searchsorted(skip.flatten().sort().values, levels)
        identities = len(smallest) - torch.searchsorted(smallest, levels)
        mean_steps = self.depth - (skipped - skip.shape[1] * identities) / len(skip)
        meets = (mean_steps <= budget * self.depth + 1e-9).nonzero()
        if not len(meets):
            raise TrainingError(
                f"no threshold brings the mean below {float(mean_steps.min()):.2f} of "
                f"{self.depth} steps, and budget {budget} asks for {budget * self.depth:.2f}; "
                "give a higher budget"
            )
        return LayerRouter(
            self.network, self.num_steps, ops=self.ops, threshold=float(levels[meets[0, 0]])
        )


# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class RouterConfig:
    """How routers are trained; width, gamma and beta are Dr.LLM's.

    Raises InputError on a value out of range.
    """

    width: int = 128
    gamma: float = 2.0
    beta: float = 0.999
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 32
    epochs: int = 100
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "router training",
            ranges={
                "width": (1, 1 << 16),
                "gamma": (0, 10),
                "beta": (0, 1 - 1e-12),
                "learning_rate": (1e-8, 1),
                "weight_decay": (0, 10),
                "batch": (1, 1 << 20),
                "epochs": (1, 1 << 20),
                "patience": (1, 1 << 20),
            },
        )


def train_layer_router(
    windows: Tensor,
    classes: Tensor,
    *,
    validation_windows: Tensor,
    validation_classes: Tensor,
    num_steps: int,
    ops: tuple[str, ...] = OPS,
    config: RouterConfig = RouterConfig(),
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[LayerRouter, dict[str, Any]]:
    """The router of the epoch with the lowest validation loss, and the history as plain JSON
    values.

    Windows f32[N, W, d] and classes i64[N, L] of train and validation questions, one row a
    question; `ops` ("skip", "execute") makes a skip gate, whose labels count every run as one.
    Class weights are those of all train questions and layers together, as in Dr.LLM. Deterministic
    for a seed; the caller's random state stays as it is. `progress(epoch, losses)` is called after
    each epoch. Raises InputError for other ops and for data that do not fit.
    """
    if ops not in (OPS, SKIP_OPS):
        raise InputError(f"ops of a router are {ops!r}; give {OPS} or {SKIP_OPS}")
    _check_rows("train", windows, classes=classes, sizes=None)
    _check_rows(
        "validation",
        validation_windows,
        classes=validation_classes,
        sizes=(windows.shape[-1], classes.shape[1]),
    )
    _check_trunk(num_steps + classes.shape[1], num_steps)
    target, held_out = (c.clamp(max=len(ops) - 1) for c in (classes, validation_classes))
    counts = torch.bincount(target.flatten(), minlength=len(ops))
    weights = class_weights(counts, config.beta)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = RouterNetwork(
            windows.shape[-1], classes.shape[1], num_classes=len(ops), width=config.width
        )
    network.standardize_by(windows)
    found = train_to_best(
        network,
        len(target),
        loss_of=lambda part: focal_loss(
            network(windows[part]), target[part], weights=weights, gamma=config.gamma
        ),
        validation_loss=lambda: float(
            focal_loss(network(validation_windows), held_out, weights=weights, gamma=config.gamma)
        ),
        config=config,
        progress=progress,
    )
    router = LayerRouter(network, num_steps, ops=ops)
    counted = {"class_counts": counts.tolist(), "class_weights": weights.tolist()}
    return router, {"config": asdict(config), "ops": list(ops), **counted, **found}


def _check_trunk(depth: int, num_steps: int) -> None:
    if not 0 <= num_steps < depth:
        raise InputError(
            f"a trunk of {num_steps} of {depth} layers leaves nothing to decide; give 0 to "
            f"{depth - 1} shared steps"
        )


def _check_rows(
    name: str, windows: Tensor, *, classes: Tensor, sizes: tuple[int, int] | None
) -> None:
    """`sizes`: what d and L must be."""
    _check_windows(windows, windows.shape[-1] if sizes is None else sizes[0])
    if classes.dim() != 2 or len(classes) != len(windows) or not classes.shape[1]:
        raise InputError(
            f"{name} classes have shape {list(classes.shape)}; give [{len(windows)}, layers], a "
            "row a question"
        )
    if sizes is not None and classes.shape[1] != sizes[1]:
        raise InputError(
            f"{name} classes are of {classes.shape[1]} layers, those of train of {sizes[1]}; give "
            "the same layers"
        )
    if classes.dtype != torch.int64 or int(classes.min()) < 0 or int(classes.max()) > 2:
        raise InputError(
            f"{name} classes must be int64 of 0 (skip), 1 (execute) and 2 (repeat); make them "
            "with router_labels"
        )


def _check_windows(windows: Tensor, size: int) -> None:
    if windows.dim() != 3 or not len(windows) or windows.shape[-1] != size:
        raise InputError(
            f"windows have shape {list(windows.shape)}; give [questions, windows, {size}] of at "
            "least one question"
        )
    if not bool(windows.isfinite().all()):
        row = int((~windows.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(
            f"the windows of question number {row} are not finite; leave it out, or use another "
            "dtype"
        )
