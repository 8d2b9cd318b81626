"""The menu selector: the probability that each program of a menu answers this input right.

It is trained on dense labels (every program of the menu on every train question), so it needs no
guess about programs that a search did not look at, and it scores whole programs: per-layer
marginals of a set of valid programs would favor `keep` everywhere. Shape legend: B batch, F
features, K programs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from .features import Features
from .known_tasks import UNKNOWN, KnownTasks
from .menu import Menu, Proposal
from .policy import Calibration


class SelectorNetwork(nn.Module):
    """Features f32[B, F] -> logits f32[B, K]: standardized, one hidden layer, a bias that starts at
    the base rates.

    With `width` 0 it is linear. Raises InputError for sizes below 1.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, num_features: int, num_programs: int, *, width: int = 64, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if min(num_features, num_programs) < 1 or width < 0:
            raise InputError(
                f"a selector of {num_features} features, {num_programs} programs and width "
                f"{width} cannot be made"
            )
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.inner = nn.Linear(num_features, width) if width else None
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(width or num_features, num_programs)

    def forward(self, features: Tensor) -> Tensor:
        seen = (features - self.mean) * self.scale
        if self.inner is not None:
            seen = nn.functional.gelu(self.inner(seen))
        return self.outer(self.dropout(seen))

    @classmethod
    @torch.no_grad()
    def mean_of(cls, networks: "Sequence[SelectorNetwork]") -> "SelectorNetwork":
        """One network whose logits are the mean of those of networks that were started from the
        same features.

        Its hidden layer is theirs side by side, so it costs one network of that width. Raises
        InputError if there is none.
        """
        if not networks:
            raise InputError("a mean of no networks cannot be made; give at least one")
        first, n = networks[0], len(networks)
        inners = [network.inner for network in networks if network.inner is not None]
        weights = [network.outer.weight for network in networks]
        width = sum(inner.out_features for inner in inners)
        merged = cls(
            len(first.mean), first.outer.out_features, width=width, dropout=first.dropout.p
        )
        merged.mean.copy_(first.mean)
        merged.scale.copy_(first.scale)
        if merged.inner is not None:
            merged.inner.weight.copy_(torch.cat([inner.weight for inner in inners]))
            merged.inner.bias.copy_(torch.cat([inner.bias for inner in inners]))
        merged.outer.weight.copy_(
            torch.cat(weights, 1) / n if inners else torch.stack(weights).mean(0)
        )
        merged.outer.bias.copy_(torch.stack([network.outer.bias for network in networks]).mean(0))
        return merged.eval()

    @torch.no_grad()
    def start_from(self, features: Tensor, rates: Tensor) -> None:
        """Standardize by these features f32[N, F], and begin with the programs' base rates
        f32[K].
        """
        self.mean.copy_(features.mean(0))
        spread = features.std(0, correction=0)
        # what never varied tells nothing
        self.scale.copy_(torch.where(spread > 1e-4, 1 / spread.clamp_min(1e-4), 0.0))
        self.outer.weight.mul_(0.1)
        self.outer.bias.copy_(torch.logit(rates.clamp(0.01, 0.99)))


class Selector:
    """A trained selector over a menu.

    `slopes` and `shifts` f32[K] calibrate the logits (Platt scaling on validation). `tasks` tells
    inputs of the tasks it was trained on apart; without it there is one threshold for all.
    """

    kind = "selector"

    def __init__(
        self,
        menu: Menu,
        features: Features,
        *,
        network: SelectorNetwork,
        calibration: Calibration | None = None,
        slopes: Tensor | None = None,
        shifts: Tensor | None = None,
        tasks: KnownTasks | None = None,
    ) -> None:
        self.menu, self.features, self.network = menu, features, network.eval()
        self.tasks = tasks
        self.calibration = calibration or Calibration()
        self.slopes = torch.ones(len(menu)) if slopes is None else slopes
        self.shifts = torch.zeros(len(menu)) if shifts is None else shifts
        if self.network.outer.out_features != len(menu):
            raise InputError(
                f"the selector scores {self.network.outer.out_features} programs but the menu has "
                f"{len(menu)}; use the menu it was trained with"
            )

    @property
    def depth(self) -> int:
        return self.menu.depth

    @property
    def num_features(self) -> int:
        return len(self.network.mean)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> np.ndarray:
        """Calibrated P(program answers right | input), f64[B, K], of pooled features f32[B, F]."""
        logits = self.network(features)
        return torch.sigmoid(logits.mul_(self.slopes).add_(self.shifts)).double().numpy()

    @torch.no_grad()
    def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
        """A proposal a row, of its hidden states [T, d] after the features' steps."""
        return self.proposals(torch.stack([self.features.pooled(h) for h in hidden]).cpu())

    def proposals(self, features: Tensor) -> list[Proposal]:
        """A proposal a row of pooled features f32[B, F]."""
        chances = self.probabilities(features)
        known = [UNKNOWN] * len(chances)
        if self.tasks is not None:
            known = self.tasks.recognized(features)
        return [
            Proposal(self.menu.programs, self.menu.steps, row, task)
            for row, task in zip(chances, known, strict=True)
        ]
