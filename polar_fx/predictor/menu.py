"""A menu: the few programs prepared ahead, among which each input gets one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InputError
from ..program import Program


@dataclass(frozen=True)
class Menu:
    """Programs of one depth, the identity first.

    Raises InputError if it is not, or for a program that is there twice.
    """

    programs: tuple[Program, ...]

    def __post_init__(self) -> None:
        if not self.programs or not self.programs[0].is_identity:
            first = f"{self.programs[0]} is first" if self.programs else "it is empty"
            raise InputError(
                f"a menu begins with the identity, which inputs fall back to, but {first}; use "
                "Menu.of(programs)"
            )
        if other := next((p for p in self.programs if p.depth != self.depth), None):
            raise InputError(
                f"program {other} has depth {other.depth}, the menu {self.depth}; make a menu for "
                "each model"
            )
        if len(set(self.programs)) < len(self.programs):
            twice = next(p for i, p in enumerate(self.programs) if p in self.programs[:i])
            raise InputError(f"program {twice} is on the menu twice; name it once")

    @classmethod
    def of(cls, programs: Iterable[Program], depth: int | None = None) -> "Menu":
        """A menu of these programs, the identity put first and repetitions left out.

        `depth` is needed if there are none.
        """
        known = list(programs)
        if not known and depth is None:
            raise InputError("a menu without programs needs a depth; give depth=, or programs")
        identity = Program.identity(known[0].depth if depth is None else depth)
        return cls(tuple(dict.fromkeys([identity, *known])))

    @property
    def depth(self) -> int:
        return self.programs[0].depth

    @cached_property
    def steps(self) -> np.ndarray:
        """Executed steps of each program, f64[K]."""
        return np.array([p.num_steps for p in self.programs], dtype=np.float64)

    def index(self, program: Program) -> int:
        """Where a program stands. Raises InputError if it is not on the menu."""
        try:
            return self.programs.index(program)
        except ValueError:
            raise InputError(
                f"program {program} is not among the menu's {len(self)}; add it, or choose one of "
                "them"
            ) from None

    def __len__(self) -> int:
        return len(self.programs)


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a predictor says of one input: programs, and the probability that each answers it right,
    f64[K].

    `steps` is what each costs, f64[K]. The identity is first. Probabilities of a predictor without
    calibrated ones are scores, and only their order means something. `task` is the one of those
    trained on that the input was recognized as; empty if it is none of them.
    """

    programs: Sequence[Program]
    steps: np.ndarray
    probabilities: np.ndarray
    task: str = ""
