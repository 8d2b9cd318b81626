"""Which of the tasks that a predictor was trained on an input is of, told by its features; or none
of them.

A threshold that was certified for all questions together says nothing of one task: a predictor
gained on the whole and lost on multiplication. With this, each task has a threshold of its own, and
inputs unlike all that was seen run the identity. Shape legend: N questions, F features, R
directions, G tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError

UNKNOWN = ""
"""Stands for the task of an input that is unlike those that were seen."""

_DIRECTIONS = 32  # along which the features vary most
_BEYOND = 1.5  # times the distance that nearly all validation questions keep
_NEARLY_ALL = 0.99


@dataclass(frozen=True, eq=False)
class KnownTasks:
    """The mean of each task's features, and how far from it its questions lie.

    Linear discriminant analysis: the task whose mean is nearest, after a projection in which what
    varies within tasks has unit variance. `center` f32[F], `projection` f32[F, R], `means`
    f32[G, R], `limits` f32[G]: the greatest distance from each mean.
    """

    names: tuple[str, ...]
    center: Tensor
    projection: Tensor
    means: Tensor
    limits: Tensor

    tensors: ClassVar[tuple[str, ...]] = ("center", "projection", "means", "limits")

    def __post_init__(self) -> None:
        num_features, directions = self.projection.shape
        fits = (
            len(self.center) == num_features
            and self.means.shape == (len(self.names), directions)
            and len(self.limits) == len(self.names) > 0
        )
        if not fits:
            raise InputError(
                f"{len(self.names)} tasks, a projection of {num_features} x {directions}, means of "
                f"{tuple(self.means.shape)} and {len(self.limits)} limits do not fit; take those "
                "of one training"
            )

    @classmethod
    @torch.no_grad()
    def learn(
        cls,
        features: Tensor,
        tasks: Sequence[str],
        *,
        others: Tensor,
        tasks_of_others: Sequence[str],
    ) -> "KnownTasks":
        """From features f32[N, F] of train questions and the names of their tasks; `others`, of
        validation questions, say how far from a mean a question of its task lies. A task without
        any of these is not recognized.
        """
        names = tuple(dict.fromkeys(tasks))
        place = torch.tensor([names.index(task) for task in tasks])
        center = features.mean(0)
        seen = features.double() - center
        directions = min(_DIRECTIONS, len(seen), seen.shape[1])
        _, _, axes = torch.linalg.svd(seen, full_matrices=False)
        principal = axes[:directions].T
        within = seen @ principal
        for g in range(len(names)):
            within[place == g] -= within[place == g].mean(0)
        _, spread, turned = torch.linalg.svd(within, full_matrices=False)
        # a direction that never varies within tasks would count without end
        unit = spread.clamp_min(1e-3 * float(spread.max().clamp_min(1e-12))) / len(seen) ** 0.5
        projection = (principal @ turned.T / unit).float()
        projected = (features - center) @ projection
        means = torch.stack([projected[place == g].mean(0) for g in range(len(names))])
        distances = torch.cdist((others - center) @ projection, means)
        own = torch.tensor([names.index(t) if t in names else -1 for t in tasks_of_others])
        limits = []
        for g in range(len(names)):
            seen_of = distances[own == g, g]
            # nothing is at a distance below 0: what is nearest to this mean is unknown
            most = torch.quantile(seen_of, _NEARLY_ALL) if len(seen_of) else torch.tensor(-1.0)
            limits.append(_BEYOND * most)
        return cls(names, center, projection, means, torch.stack(limits))

    @torch.no_grad()
    def recognized(self, features: Tensor) -> list[str]:
        """The task of each row of features f32[N, F], or `UNKNOWN`."""
        distances = torch.cdist((features - self.center) @ self.projection, self.means)
        nearest, place = distances.min(1)
        known = nearest <= self.limits[place]  # False where it is no number
        return [
            self.names[g] if inside else UNKNOWN
            for g, inside in zip(place.tolist(), known.tolist(), strict=True)
        ]
