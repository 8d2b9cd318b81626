"""Features of questions, as a dispatcher will see them: by running the trunk on their prompts."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..predictor.features import Features
from ..questions.question import EncodedQuestion
from ..runtime.trunk import run_trunk

if TYPE_CHECKING:
    from ..compiled import CompiledModel

_BATCH = 16


def pooled_features(
    model: "CompiledModel",
    questions: Sequence[EncodedQuestion],
    *,
    features: Features,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """f32[N, 2 d]. Raises KvOverflowError for a prompt that does not fit the model."""
    return torch.stack(
        _each(model, questions, features=features, of=features.pooled, progress=progress)
    )


def token_features(
    model: "CompiledModel",
    questions: Sequence[EncodedQuestion],
    *,
    features: Features,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """A question's states [T, d] as the model has them, T at most the window; pooled they are the
    `pooled_features`.

    Raises KvOverflowError for a prompt that does not fit the model.
    """
    return _each(model, questions, features=features, of=features.tokens, progress=progress)


def _each(
    model: "CompiledModel",
    questions: Sequence[EncodedQuestion],
    *,
    features: Features,
    of: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None,
) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    order = sorted(
        range(len(questions)), key=lambda i: len(questions[i].prefix) + len(questions[i].prompt)
    )
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        rows = [torch.tensor((*questions[i].prefix, *questions[i].prompt)) for i in part]
        with run_trunk(model.runner, rows, num_steps=features.num_steps) as trunk:
            found |= {
                i: of(hidden).cpu().clone() for i, hidden in zip(part, trunk.hidden, strict=True)
            }
        if progress is not None:
            progress(len(found), len(questions))
    return [found[i] for i in range(len(questions))]
