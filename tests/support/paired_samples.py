"""Outcomes in pairs, and arms made of them."""

from typing import Any

import numpy as np

from polar_fx.stats.arms import ArmResult


def pairs(gained: int, lost: int, *, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of method and identity with these counts."""
    mine = [True] * gained + [False] * lost + [True] * both + [False] * neither
    theirs = [False] * gained + [True] * lost + [True] * both + [False] * neither
    return np.array(mine), np.array(theirs)


def arm(
    name: str,
    task: str = "addition",
    *,
    cells: tuple[int, int, int, int] = (6, 2, 10, 2),
    **more: Any,
) -> ArmResult:
    """Cells are gained, lost, both, neither; the questions are put in one order, by the identity's
    answer.
    """
    gained, lost, both, neither = cells
    right, identity = pairs(gained, lost, both=both, neither=neither)
    order = np.argsort(~identity, kind="stable")
    n = len(right)
    return ArmResult(
        name,
        task,
        right[order],
        identity[order],
        **{"steps": np.full(n, 24.0), "identity_steps": 30, **more},
    )
