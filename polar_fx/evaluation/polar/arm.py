"""PoLar's own predictor (arXiv 2606.06574, section 3) as one way among others to choose a program.

Trained on what searches found, with the hidden states after the trunk as token features in place of
the paper's text encoder, so that it sees what the other predictors see. Shape legend: T tokens, Q
feature size, D layers, O op classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...program import Program
from ...runtime.trunk import shares_trunk
from ...search.records.records import SearchRecord
from ..layer_router import right_programs
from .decode import Decoded, decode_beam, decode_budget, decode_joint
from .labels import LabelCounts, QuestionPrograms, label_rows
from .network import NetworkConfig, PolarNetwork, pad_features
from .training import LabelledQuestions, NetworkTraining, TrainedNetwork, train_network

Decoder = Callable[[Tensor, Tensor], list[Decoded]]

_BATCH = 64
# Beside any logit of a network this leaves no probability, and sums of it stay finite.
_NEVER = -1e4


@dataclass(frozen=True, slots=True)
class ArmCounts:
    """What became of the records: the labels' own account, and what did not get so far.

    `off_trunk` counts programs found right that do not share the trunk, `overturned` those
    (identities too) that verification found wrong.
    """

    labels: LabelCounts
    off_trunk: int
    overturned: int


def question_programs(record: SearchRecord, num_steps: int) -> QuestionPrograms:
    """The record's right programs that share the trunk of `num_steps` steps; verified verdicts
    count where there are any.
    """
    identity_correct, programs = right_programs(record, num_steps)
    return QuestionPrograms(record.question.id, identity_correct, programs)


def train_polar_arm(
    records_train: Sequence[SearchRecord],
    records_validation: Sequence[SearchRecord],
    *,
    token_features_by_id: Mapping[str, Tensor],
    depth: int,
    num_steps: int,
    network: NetworkConfig | None = None,
    training: NetworkTraining | None = None,
    max_paths: int = 50,
    identity_weight: float = 0.3,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> tuple[TrainedNetwork, dict[str, ArmCounts]]:
    """A trained network and, for "train" and "validation", what became of the records.

    `token_features_by_id` has features [T, Q] of every question that gives a label row. `network`
    defaults to the paper's sizes; `max_paths`, `identity_weight` and `seed` are those of
    `label_rows`. Raises InputError if a question is in both parts or has no features, if no program
    answers any question of a part, and what `label_rows` and `train_network` raise.
    """
    if shared := _question_ids(records_train) & _question_ids(records_validation):
        raise InputError(
            f"question {min(shared)!r} is in train and in validation; split questions before "
            "searching"
        )
    if network is None:
        if not token_features_by_id:
            raise InputError("there are no token features; collect those of all searched questions")
        network = NetworkConfig(depth, next(iter(token_features_by_id.values())).shape[-1])
    parts: dict[str, LabelledQuestions] = {}
    counts: dict[str, ArmCounts] = {}
    for name, records in (("train", records_train), ("validation", records_validation)):
        labels = label_rows(
            [question_programs(r, num_steps) for r in records],
            depth,
            max_paths=max_paths,
            identity_weight=identity_weight,
            repeat_times=network.repeat_times,
            seed=seed,
        )
        counts[name] = ArmCounts(labels.counts, *_lost(records, num_steps))
        questions = list(dict.fromkeys(row.question for row in labels.rows))
        if missing := next((q for q in questions if q not in token_features_by_id), None):
            raise InputError(
                f"{name} question {missing!r} has no token features; collect those of all "
                "searched questions"
            )
        parts[name] = LabelledQuestions(
            questions, [token_features_by_id[q] for q in questions], labels.rows
        )
    return train_network(
        parts["train"],
        parts["validation"],
        network_config=network,
        config=training,
        progress=progress,
    ), counts


def _question_ids(records: Iterable[SearchRecord]) -> set[str]:
    return {record.question.id for record in records}


def _lost(records: Iterable[SearchRecord], num_steps: int) -> tuple[int, int]:
    off_trunk = overturned = 0
    for record in records:
        again = record.verified
        overturned += sum(
            p in again and not again[p].correct
            for p, verdict in record.verdicts.items()
            if verdict.correct
        )
        off_trunk += sum(not shares_trunk(p, num_steps) for p in record.valid)
    return off_trunk, overturned


class PolarArm:
    """Programs of a trained network that can go on after the trunk, best first.

    The decoders are PoLar's and the exact ones beside it. What they find that does not share the
    trunk is left out; if nothing is left, they decode once more with the trunk's layers kept.
    Raises InputError if the network has no layer after the trunk.
    """

    def __init__(self, network: PolarNetwork, num_steps: int) -> None:
        self.network, self.num_steps = network.eval(), num_steps
        if not 0 <= num_steps < self.depth:
            raise InputError(
                f"num_steps is {num_steps}; give 0 to {self.depth - 1}, of the network's "
                f"{self.depth} layers"
            )

    @property
    def depth(self) -> int:
        return self.network.config.depth

    def beam(self, features: Sequence[Tensor], count: int = 5) -> list[list[Program]]:
        """By PoLar's beam search, 1 to `count` programs a question of features [T, Q].

        The first is the single-shot choice.
        """
        return self._decode(features, lambda b, o: decode_beam(b, o, beam=count))

    def joint(self, features: Sequence[Tensor], count: int = 1) -> list[list[Program]]:
        """The likeliest over all segmentations and ops together, 1 to `count` a question."""
        return self._decode(features, lambda b, o: decode_joint(b, o, count=count))

    def budget(self, features: Sequence[Tensor], fraction: float) -> list[Program]:
        """The likeliest of at most `fraction` x depth steps, one a question.

        Raises InputError if the fraction is not in (0, 1] or leaves no step after the trunk.
        """
        steps = math.floor(fraction * self.depth + 1e-9) if 0 < fraction <= 1 else 0
        if steps <= self.num_steps:
            raise InputError(
                f"fraction {fraction} of {self.depth} steps leaves none after a trunk of "
                f"{self.num_steps}; give {(self.num_steps + 1) / self.depth:.3f} to 1"
            )

        def at_most(boundary: Tensor, op: Tensor) -> list[Decoded]:
            return [decode_budget(boundary, op, budget=steps, exact=False)]

        def exactly(boundary: Tensor, op: Tensor) -> list[Decoded]:
            return [decode_budget(boundary, op, budget=steps)]

        # Of at most so many steps the trunk alone may be likeliest; of exactly so many, some come
        # after it.
        return [programs[0] for programs in self._decode(features, at_most, exactly)]

    def _decode(self, features: Sequence[Tensor], *decoders: Decoder) -> list[list[Program]]:
        return [
            self._after_trunk(boundary, op, decoders=decoders)
            for boundary, op in self._logits(features)
        ]

    def _after_trunk(
        self, boundary: Tensor, op: Tensor, *, decoders: Sequence[Decoder]
    ) -> list[Program]:
        kept = op.clone()
        kept[: self.num_steps, 0] = _NEVER
        kept[: self.num_steps, 2:] = _NEVER
        for decode in decoders:
            for logits in (op, kept):
                found = [
                    each.program
                    for each in decode(boundary, logits)
                    if shares_trunk(each.program, self.num_steps)
                ]
                if found:
                    return found
        return [Program.identity(self.depth)]

    @torch.no_grad()
    def _logits(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boundary logits [D] and op logits [D, O] of each question."""
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(features), _BATCH):
            boundary, op = self.network(*pad_features(features[start : start + _BATCH]))
            found += zip(boundary.double(), op.double(), strict=True)
        return found
