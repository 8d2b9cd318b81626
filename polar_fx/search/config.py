"""Every constant of a search, with where it comes from."""

import math
from dataclasses import dataclass, fields

from ..errors import InputError


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a search. Raises InputError on a value out of range.

    Sources: P = PoLar (arXiv 2606.06574), C = CoLa (arXiv 2507.07996), R = RE-PoLar (arXiv
    2609.31360), D = DR.LLM.
    """

    method: str = "mcts"
    """mcts, scan (every single edit), random, beam or evolution."""
    simulations: int = 200
    """Programs looked at beside the identity, which is not charged (C, R)."""
    reward: str = "exact"
    """exact (P), likelihood or margin."""
    seed: int = 0
    """Of the run; each question derives its own from it and its id, because a shared seed fakes a
    menu (R).
    """
    max_length: int = 4
    """Layers of one edit (P: k <= 4)."""
    max_extra: int = 4
    """Further runs of a repeated block (P: r <= 4; C, R: extra copies, so up to 5 runs)."""
    max_steps_ratio: float = 2.0
    """Longest path as a multiple of the depth (C)."""
    nested: bool = False
    """Edit the current path (P, App.

    B.3) instead of the identity; such paths may have no segments (R).
    """

    exploration: float = math.sqrt(2)
    """c of the score (R; C and D: 1.8)."""
    length_penalty: float = 5.0
    """lambda of the score (C's paper and R; D: 3.0)."""
    random_child: float = 0.0
    """Probability of descending into a random child (R; C and D: 0.1)."""
    global_visits: bool = True
    """V of the score counts all simulations (P, C, D, R), not the parent's visits."""
    widening_factor: float = 2.0
    widening_exponent: float = 0.5
    """A node has at most max(1, ceil(factor * visits^exponent)) children (R: 2.0 and 0.5)."""

    max_edits: int = 4
    """Edits of a random, beam or evolved program (ours: rescues of R mostly have few)."""
    beam_width: int = 8
    population: int = 24
    """Of beam search and of evolution (ours)."""

    def __post_init__(self) -> None:
        for name in (
            "simulations",
            "max_length",
            "max_extra",
            "max_edits",
            "beam_width",
            "population",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; give a whole number of at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed is {self.seed!r}; give a whole number")
        for name, low, high in (
            ("exploration", 0, math.inf),
            ("length_penalty", 0, math.inf),
            ("random_child", 0, 1),
            ("max_steps_ratio", 1, math.inf),
            ("widening_factor", 0, math.inf),
            ("widening_exponent", 0, 1),
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not low <= value <= high
                or value == math.inf
            ):
                raise InputError(f"{name} is {value!r}; give a number from {low} to {high}")

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "SearchConfig":
        """The inverse of `dataclasses.asdict`. Raises InputError naming an unknown setting."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"unknown search setting {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**values)  # type: ignore[arg-type]
