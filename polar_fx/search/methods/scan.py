"""Every single edit, random ones, and a given list: what any search has to beat."""

import random
from collections.abc import Sequence

from ...program import Program
from ..config import SearchConfig
from .edits import Method, Sampler, Search, max_steps, num_steps, single_edits


def scan(depth: int, config: SearchConfig, rng: random.Random) -> Search:
    """Every single edit, in the order of `single_edits`, in one list.

    With fewer simulations than edits an evenly spread part of them: each op, length and number of
    runs keeps its share.
    """
    yield [Program.identity(depth)]
    every = single_edits(depth, config.max_length, max_extra=config.max_extra)
    edits = [edit for edit in every if 0 < num_steps((edit,), depth) <= max_steps(depth, config)]
    if len(edits) > config.simulations:
        edits = [edits[i * len(edits) // config.simulations] for i in range(config.simulations)]
    if edits:
        yield [Program.from_edits([edit], depth) for edit in edits]


def random_search(depth: int, config: SearchConfig, rng: random.Random) -> Search:
    """Random programs of 1 to `max_edits` edits, in one list."""
    yield [Program.identity(depth)]
    sampler = Sampler(depth, config, rng=rng)
    if candidates := sampler.batch(config.simulations, sampler.random_edits):
        yield [candidate.program for candidate in candidates]


def listed(programs: Sequence[Program]) -> Method:
    """A method that looks at exactly these programs, in one list: every question then has a verdict
    of each of them.
    """

    def search(depth: int, config: SearchConfig, rng: random.Random) -> Search:
        identity = Program.identity(depth)
        yield [identity]
        if others := [program for program in dict.fromkeys(programs) if program != identity]:
            yield others

    return search
