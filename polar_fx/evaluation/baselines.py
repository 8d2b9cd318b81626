"""The methods a selector has to beat, each trained on the same train questions and none on test
ones.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, TrainingError
from ..predictor.features import Features
from ..predictor.selector import Selector
from ..questions.question import EncodedQuestion, Question, places_of
from ..search.analysis.menu_coverage import merge
from ..search.records.record_file import RecordReader
from ..search.records.records import SearchRecord
from ..training.collect import token_features
from ..training.mining import best_static
from ..training.pipeline import MINED
from ..training.verdict_table import VerdictTable
from .block_influence import block_influences, least_influence_program
from .choices import (
    BEST_STATIC,
    FIRST_OF_BEAM,
    POLAR_NETWORK,
    Choice,
    random_skips,
    static,
    static_by_task,
)
from .layer_router import OPS, SKIP_OPS, pool_windows, router_labels, train_layer_router
from .polar.arm import PolarArm, train_polar_arm
from .polar.text_encoder import TextEncoder
from .polar.training import NetworkTraining

if TYPE_CHECKING:
    from ..compiled import CompiledModel

LEFT_OUT = "left_out"
"""What the notes of a baseline hold that could not be trained: the reason."""
_BUDGET = 0.9
_INFLUENCE_PROMPTS = 64


@dataclass(frozen=True, eq=False)
class TrainingRecords:
    """Records of train and validation questions.

    `dense` have every program of the menu, `train` whatever was tried.
    """

    dense: list[SearchRecord]
    train: list[SearchRecord]
    validation: list[SearchRecord]


@dataclass(frozen=True, eq=False)
class Setting:
    """What every trained baseline is given: records, the depth D of the model, the number of first
    steps that all programs share, and a seed.
    """

    known: TrainingRecords
    depth: int
    trunk: int
    seed: int = 0

    @property
    def splits(self) -> dict[str, list[SearchRecord]]:
        return {"train": self.known.train, "validation": self.known.validation}


@dataclass(frozen=True, eq=False)
class TrainedOn:
    """What a predictor was made of: dense records of its train and validation questions, and ids of
    those it was mined from.
    """

    train: list[SearchRecord]
    validation: list[SearchRecord]
    mined: frozenset[str]

    @classmethod
    def read(cls, predictor: Path) -> "TrainedOn":
        """Of the predictor's folder. Raises InputError, RecordFileError."""
        parts = predictor / "parts"
        try:
            mined = json.loads((parts / MINED).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{parts / MINED} cannot be read: {error}; train again, or bring it back"
            ) from error
        train, validation = (
            list(RecordReader(parts / f"{name}.jsonl")) for name in ("train", "validation")
        )
        return cls(train, validation, frozenset(mined))

    @property
    def questions(self) -> list[Question]:
        return [r.question for r in (*self.train, *self.validation)]

    @property
    def ids(self) -> frozenset[str]:
        """Of all questions that mining, training or validation looked at."""
        return self.mined | {q.id for q in self.questions}


def training_records(
    trained_on: TrainedOn, searches: Sequence[Path], *, test_ids: set[str], model: str
) -> TrainingRecords:
    """What a predictor was trained on, and what searches found for other questions.

    Raises InputError if a test question is among them or a search was of another model than that of
    fingerprint `model`, and RecordFileError for a file that cannot be read.
    """
    for path in searches:
        if RecordReader(path).header.model != model:
            raise InputError(
                f"{path} has records of another model; name searches of the model that is "
                "evaluated, in its dtype"
            )
    dense, validation = trained_on.train, trained_on.validation
    held_out = {r.question.id for r in validation}
    more = [r for path in searches for r in RecordReader(path) if r.question.id not in held_out]
    train = merge([*more, *dense])
    if shared := sorted(test_ids & ({r.question.id for r in train} | held_out)):
        raise InputError(
            f"test question {shared[0]!r} (and {len(shared) - 1} more) is among the training "
            "records or in one of the files of searches; ask questions of the test split, and "
            "search others"
        )
    return TrainingRecords(dense, train, validation)


def static_choices(
    known: TrainingRecords, selector: Selector, *, questions: Sequence[Question]
) -> list[Choice]:
    """The best programs of the menu on train questions: over all, within the budget, and a task
    each.
    """
    table = VerdictTable.of(known.dense, selector.menu.programs)
    n = len(questions)
    of_tasks = places_of([q.task for q in table.questions])
    by_task = {task: best_static(table.rows(np.array(places))) for task, places in of_tasks.items()}
    within = best_static(table, _BUDGET * table.depth)
    return [
        static(BEST_STATIC, best_static(table), n=n),
        static(f"{BEST_STATIC} <= {_BUDGET:g} steps", within, n=n),
        static_by_task(f"{BEST_STATIC} a task (told the task)", by_task, questions=questions),
    ]


def pruning_choices(
    model: "CompiledModel",
    encoded: Sequence[EncodedQuestion],
    *,
    selector: Selector,
    n: int,
    seed: int,
) -> tuple[list[Choice], list[float]]:
    """Block-influence pruning (arXiv 2403.03853) at the budget, random programs of as many steps;
    and each layer's influence.
    """
    trunk, depth = selector.features.num_steps, selector.depth
    steps = int(_BUDGET * depth + 1e-9)
    prompts = [
        torch.tensor((*e.prefix, *e.prompt))
        for e in encoded[:: max(1, len(encoded) // _INFLUENCE_PROMPTS)]
    ]
    influences = block_influences(model, prompts[:_INFLUENCE_PROMPTS])
    runs = model.library.runs
    pruned = least_influence_program(influences, depth - steps, protected=trunk, runs=runs)
    made = [
        static(f"block-influence pruning, {steps} steps", pruned, n=n),
        random_skips(
            f"random program of {steps} steps",
            depth,
            num_steps=steps,
            trunk=trunk,
            n=n,
            seed=seed,
            runs=runs,
        ),
    ]
    return made, influences.tolist()


def learned_choices(
    model: "CompiledModel",
    setting: Setting,
    *,
    features: Features,
    encoded: Mapping[str, EncodedQuestion],
    seen: Sequence[Tensor],
) -> tuple[list[Choice], dict[str, Any]]:
    """Per-layer routers and PoLar's network, on the same states as the selector; and how their
    training went.

    `encoded` are the searched questions by id, `seen` the states of the test questions
    (`token_features`).
    """
    seen = [states.float() for states in seen]
    tokens = {
        split: _tokens(model, records, encoded=encoded, features=features)
        for split, records in setting.splits.items()
    }
    choices, notes = router_choices(setting, tokens, seen=seen)
    together = {**tokens["train"], **tokens["validation"]}
    polar = partial(polar_choices, POLAR_NETWORK, setting, tokens=together, seen=seen)
    more, notes[POLAR_NETWORK] = if_it_learns(polar)
    return choices + more, notes


def if_it_learns(
    train: Callable[[], tuple[list[Choice], dict[str, Any]]],
) -> tuple[list[Choice], dict[str, Any]]:
    """What a baseline chooses, and how its training went; of one that has nothing to learn from no
    choices, and the reason as `left_out`.
    """
    try:
        return train()
    except TrainingError as error:
        return [], {LEFT_OUT: str(error)}


def router_choices(
    setting: Setting, tokens: Mapping[str, Mapping[str, Tensor]], *, seen: Sequence[Tensor]
) -> tuple[list[Choice], dict[str, Any]]:
    """Per-layer routers, and how their training went; one that has nothing to learn from is left
    out, and its notes say why.

    `tokens` has token features f32[T, Q] by split and question id, `seen` those of the test
    questions.
    """
    windows, labels = {}, {}
    for split, records in setting.splits.items():
        labels[split] = router_labels(records, setting.depth, num_steps=setting.trunk)
        windows[split] = [pool_windows(tokens[split][name]) for name in labels[split].questions]
    held_out = torch.stack([pool_windows(t) for t in tokens["validation"].values()])
    asked = torch.stack([pool_windows(t) for t in seen])

    def choose(name: str, ops: tuple[str, ...]) -> tuple[list[Choice], dict[str, Any]]:
        for split, pooled in windows.items():
            if not pooled:
                raise TrainingError(
                    f"no program answers any of the {len(setting.splits[split])} {split} "
                    "questions; ask others"
                )
        router, history = train_layer_router(
            torch.stack(windows["train"]),
            labels["train"].classes,
            validation_windows=torch.stack(windows["validation"]),
            validation_classes=labels["validation"].classes,
            num_steps=setting.trunk,
            ops=ops,
        )
        if ops == SKIP_OPS:
            router = router.with_budget(held_out, _BUDGET)
        notes = {k: v for k, v in history.items() if k != "history"}
        return [Choice.single(name, router.programs(asked))], notes

    found, notes = [], {}
    for name, ops in (
        ("per-layer router (DR.LLM-style)", OPS),
        (f"skip gate <= {_BUDGET:g} steps (MindSkip-style)", SKIP_OPS),
    ):
        more, notes[name] = if_it_learns(partial(choose, name, ops))
        found += more
    return found, notes


def encoder_choices(
    encoder: TextEncoder, setting: Setting, *, test: Sequence[Question]
) -> tuple[list[Choice], dict[str, Any]]:
    """PoLar's network on what the paper gives it: a frozen text encoder's states of the question;
    and how its training went.
    """
    learned = [r.question for records in setting.splits.values() for r in records]
    states = encoder.states([q.question for q in (*learned, *test)])
    ids = [question.id for question in learned]
    by_id = dict(zip(ids, states[: len(ids)], strict=True))
    name = f"{POLAR_NETWORK} on a text encoder"
    seen = states[len(learned) :]
    polar = partial(polar_choices, name, setting, tokens=by_id, seen=seen)
    choices, notes = if_it_learns(polar)
    return choices, {name: {**notes, "encoder": encoder.fingerprint}}


def polar_choices(
    name: str, setting: Setting, *, tokens: Mapping[str, Tensor], seen: Sequence[Tensor]
) -> tuple[list[Choice], dict[str, Any]]:
    """PoLar's network by several decoders, and how its training went.

    `tokens` has token features f32[T, Q] of the searched questions by id, `seen` those of the test
    questions.
    """
    trained, counts = train_polar_arm(
        setting.known.train,
        setting.known.validation,
        token_features_by_id=tokens,
        depth=setting.depth,
        num_steps=setting.trunk,
        training=NetworkTraining(epochs=10, seed=setting.seed),
        seed=setting.seed,
    )
    arm = PolarArm(trained.network, setting.trunk)
    ranked = arm.beam(seen)
    first = [found[0] for found in ranked]
    jointly = [found[0] for found in arm.joint(seen)]
    choices = [
        Choice.single(f"{name}{FIRST_OF_BEAM}", first),
        Choice.single(f"{name}, joint decode", jointly),
        Choice.single(f"{name}, budget {_BUDGET:g}", arm.budget(seen, _BUDGET)),
        Choice(f"{name}, pass@5", tuple(map(tuple, ranked)), True),
    ]
    num_identity = sum(program.is_identity for program in first)
    return choices, {
        "best_epoch": trained.history["best_epoch"],
        "validation_loss": trained.history["best_validation_loss"],
        "labels": {split: str(found) for split, found in counts.items()},
        "identity_first": num_identity / len(ranked),
    }


def _tokens(
    model: "CompiledModel",
    records: Sequence[SearchRecord],
    *,
    encoded: Mapping[str, EncodedQuestion],
    features: Features,
) -> dict[str, Tensor]:
    questions = [encoded[r.question.id] for r in records]
    found = token_features(model, questions, features=features)
    return {q.id: states.float() for q, states in zip(questions, found, strict=True)}
