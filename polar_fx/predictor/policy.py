"""Policies: which of the proposed programs an input runs.

Each is written as one text: `identity`, `accuracy`, `steps<=0.9`, `mean_steps<=0.9`,
`latency_ms<=30`, or a program. Shape legend: K programs of a proposal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from ..errors import InputError, ProgramError
from ..program import Program
from .menu import Proposal

Kind = Literal["identity", "accuracy", "steps", "mean_steps", "latency_ms", "program"]
_EXAMPLES = (
    "identity, accuracy, steps<=0.9, mean_steps<=0.9, latency_ms<=30, or a program such as 'skip 5'"
)


@dataclass(frozen=True)
class Calibration:
    """What was set on validation questions, never on test ones.

    `threshold`: another program than the identity runs only if its predicted gain (difference of
    the two probabilities) reaches it; inf: never. `prices`: by budget, a fraction of the identity's
    steps, the price per `depth` steps, in probability: a longer program must gain at least this
    much; chosen so that mean steps meet the budget. `by_task`: where it is not empty, the
    threshold of each task that inputs are recognized as, in place of the one of all; other inputs
    run the identity.
    """

    threshold: float = math.inf
    prices: Mapping[float, float] = field(default_factory=dict)
    by_task: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite threshold is None."""
        prices = {str(f): price for f, price in self.prices.items()}
        by_task = {task: _finite(tau) for task, tau in self.by_task.items()}
        return {"threshold": _finite(self.threshold), "prices": prices, "by_task": by_task}

    def threshold_for(self, task: str) -> float:
        """That of an input recognized as this task."""
        return self.by_task.get(task, math.inf) if self.by_task else self.threshold


@dataclass(frozen=True)
class Policy:
    """Chooses one of the proposed programs.

    - `identity`: always that.
    - `accuracy`: the likeliest to answer right, if its predicted gain over the identity reaches the
    threshold; that of the input's task, where each has one.
    - `steps<=f`: the likeliest with at most f x depth steps, for each input (a compute budget as in
    BUDDY, arXiv 2606.09514).
    - `mean_steps<=f`: likeliest at a price for steps, set on validation so that their mean is at
    most f x depth.
    - `latency_ms<=t`: the likeliest whose measured prefill and decode step take at most t.
    - a program: that one, whatever the predictor says.

    Equal probabilities go to fewer steps. Where nothing fits a budget, the identity runs.
    """

    kind: Kind
    limit: float = 1.0
    program: Program | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"unknown policy {self.kind!r}; write {_EXAMPLES}")
        if not self.limit > 0 or math.isinf(self.limit):
            raise InputError(
                f"the limit of policy {self.kind!r} is {self.limit}; give a positive number"
            )

    @classmethod
    def parse(cls, text: "str | Policy", depth: int) -> "Policy":
        """A policy from its text. Raises InputError showing the forms there are."""
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            raise InputError(
                f"policy is {text!r} ({type(text).__name__}); give a text: {_EXAMPLES}"
            )
        kind, less, limit = text.replace(" ", "").partition("<=")
        if less:
            if kind not in ("steps", "mean_steps", "latency_ms"):
                raise InputError(f"policy {text!r} has a limit of {kind!r}; write {_EXAMPLES}")
            try:
                value = float(limit)
            except ValueError:
                raise InputError(
                    f"policy {text!r}: {limit!r} is no number; write {_EXAMPLES}"
                ) from None
            return cls(kind, value)
        if text in ("identity", "accuracy"):
            return cls(text)
        try:
            return cls("program", program=Program.parse(text, depth))
        except ProgramError as error:
            raise InputError(f"policy {text!r} is none of {_EXAMPLES}: {error}") from error

    def __str__(self) -> str:
        if self.kind == "program":
            return str(self.program)
        return (
            self.kind if self.kind in ("identity", "accuracy") else f"{self.kind}<={self.limit:g}"
        )

    def check(self, calibration: Calibration, costs_ms: Mapping[Program, float] | None) -> None:
        """Raise InputError if what the policy needs was not measured."""
        if self.kind == "mean_steps" and self.limit not in calibration.prices:
            known = ", ".join(f"{f:g}" for f in calibration.prices) or "none"
            raise InputError(
                f"no price of mean_steps<={self.limit:g} was set in training, only of {known}; "
                f"`python -m polar_fx train --budget {self.limit:g}` sets one"
            )
        if self.kind == "latency_ms" and not costs_ms:
            raise InputError(
                "latency_ms<= needs measured costs; call warmup() first, which measures them"
            )

    def choose(
        self,
        proposal: Proposal,
        calibration: Calibration,
        *,
        costs_ms: Mapping[Program, float] | None = None,
    ) -> int:
        """The chosen place in the proposal; 0 is the identity, also where a probability is not a
        number.
        """
        chances = proposal.probabilities
        if self.kind == "identity" or not np.isfinite(chances).all():
            return 0
        if self.kind == "program":
            return next((i for i, p in enumerate(proposal.programs) if p == self.program), 0)
        depth = proposal.programs[0].depth
        if self.kind == "accuracy":
            best = _best(chances, proposal.steps)
            least = calibration.threshold_for(proposal.task)
            return best if chances[best] - chances[0] >= least else 0
        if self.kind == "mean_steps":
            return _best(
                chances - calibration.prices[self.limit] * proposal.steps / depth, proposal.steps
            )
        if self.kind == "steps":
            fits = proposal.steps <= self.limit * depth + 1e-9
        else:
            costs_ms = costs_ms or {}
            fits = np.array([costs_ms.get(p, math.inf) <= self.limit for p in proposal.programs])
        return _best(np.where(fits, chances, -math.inf), proposal.steps) if fits.any() else 0


def _finite(threshold: float) -> float | None:
    return None if math.isinf(threshold) else threshold


def _best(scores: np.ndarray, steps: np.ndarray) -> int:
    """The place of the highest score; among equals the one with fewest steps, then the first."""
    best = int(scores.argmax())
    equal = np.flatnonzero(scores == scores[best])
    return best if len(equal) == 1 else int(equal[steps[equal].argmin()])
