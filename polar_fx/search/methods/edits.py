"""The programs a search may look at: the identity with a few edits in it.

A search is pure: a generator that yields lists of programs and is sent their rewards, 0..1, in
order. So whoever drives it decides what running a program means, and can run the searches of many
questions in lockstep. The first list is the identity alone, which is not charged to
`SearchConfig.simulations`, and no program is yielded twice.
"""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache

from ...program import MAX_STEPS, Edit, Op, Program
from ..config import SearchConfig

Search = Generator[list[Program], list[float], None]
Method = Callable[[int, SearchConfig, random.Random], Search]
Edits = tuple[Edit, ...]

_MAX_DRAWS = 100  # fruitless draws in a row after which what can be reached is taken for used up


@lru_cache(maxsize=16)
def single_edits(depth: int, max_length: int, *, max_extra: int) -> Edits:
    """Every single edit of `depth` layers: skips first, then repeats by their runs, each by length
    and start.

    One tuple serves all searches of a depth, which keep indices into it: lists of their own held 13
    GB in a thousand trees (RE-PoLar).
    """
    # a skip leaves `times` at 2
    kinds = [(Op.SKIP, 2), *((Op.REPEAT, 1 + extra) for extra in range(1, max_extra + 1))]
    return tuple(
        Edit(start, length, op, times)
        for op, times in kinds
        for length in range(1, min(max_length, depth) + 1)
        for start in range(depth - length + 1)
    )


def max_steps(depth: int, config: SearchConfig) -> int:
    """The longest path a search makes."""
    # rounded: 1.15 * 20 is not quite 23
    return min(MAX_STEPS, int(round(depth * config.max_steps_ratio, 6)))


def runs(edit: Edit) -> int:
    """How often the edited layers run."""
    return edit.times if edit.op is Op.REPEAT else 0


def num_steps(edits: Edits, depth: int) -> int:
    """How many steps the identity has with `edits` in it."""
    return depth + sum(edit.length * (runs(edit) - 1) for edit in edits)


def layer_mask(edit: Edit) -> int:
    """The edited layers as the bits of an int."""
    return ((1 << edit.length) - 1) << edit.start


def union_mask(edits: Edits) -> int:
    """The layers that any of the edits changes, as the bits of an int."""
    taken = 0
    for edit in edits:
        taken |= layer_mask(edit)
    return taken


@dataclass(slots=True)
class Candidate:
    """A program with the edits that made it and, once it ran, its reward."""

    edits: Edits
    program: Program
    reward: float = 0.0

    @property
    def rank(self) -> tuple[float, int]:
        """Sorts higher rewards first, then fewer steps."""
        return -self.reward, self.program.num_steps


class Sampler:
    """Draws random programs, none twice and never the identity."""

    def __init__(self, depth: int, config: SearchConfig, *, rng: random.Random) -> None:
        self._depth, self._config, self._rng = depth, config, rng
        self._edits = single_edits(depth, config.max_length, max_extra=config.max_extra)
        self._max_steps = max_steps(depth, config)
        self._seen = {Program.identity(depth)}

    @property
    def budget_left(self) -> int:
        """How many further programs the search may look at."""
        return self._config.simulations - (len(self._seen) - 1)

    def new_program(self, edits: Edits) -> Program | None:
        """The program of `edits`, or None if it is empty, too long or was made before."""
        if not 0 < num_steps(edits, self._depth) <= self._max_steps:
            return None
        program = Program.from_edits(edits, self._depth)
        if program in self._seen:
            return None
        self._seen.add(program)
        return program

    def batch(self, size: int, propose: Callable[[], Edits]) -> list[Candidate]:
        """Up to `size` new programs within the budget, made of what `propose` returns; fewer where
        they run out.
        """
        found: list[Candidate] = []
        size, misses = min(size, self.budget_left), 0
        while len(found) < size and misses < _MAX_DRAWS:
            edits = propose()
            if (program := self.new_program(edits)) is None:
                misses += 1
            else:
                found.append(Candidate(edits, program))
                misses = 0
        return found

    def grow(self, edits: Edits) -> Edits:
        """`edits` with a random one more, or as they are if there are `max_edits` or no place was
        found.

        The place is any free one: placed from left to right, half of all edits were in the last
        third (RE-PoLar).
        """
        if len(edits) >= self._config.max_edits:
            return edits
        taken = union_mask(edits)
        for _ in range(_MAX_DRAWS):
            edit = self._edits[self._rng.randrange(len(self._edits))]
            if not layer_mask(edit) & taken:
                return (*edits, edit)
        return edits

    def random_edits(self) -> Edits:
        """1 to `max_edits` random edits, each number equally likely."""
        edits: Edits = ()
        for _ in range(self._rng.randint(1, self._config.max_edits)):
            edits = self.grow(edits)
        return edits


def reward_all(candidates: list[Candidate]) -> Search:
    """Yield the programs of `candidates` and note the rewards sent back; for `yield from`."""
    rewards = yield [candidate.program for candidate in candidates]
    for candidate, reward in zip(candidates, rewards, strict=True):
        candidate.reward = reward
