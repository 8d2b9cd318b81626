"""Evolution: a population of edit sets that are crossed and mutated."""

import random

from ...program import Program
from ..config import SearchConfig
from .edits import Candidate, Edits, Sampler, Search, layer_mask, reward_all, union_mask


def evolution(depth: int, config: SearchConfig, rng: random.Random) -> Search:
    """Random programs first, then generations of as many children; the best `population` of old and
    new live on.
    """
    alive = [Candidate((), Program.identity(depth))]
    yield from reward_all(alive)
    sampler = Sampler(depth, config, rng=rng)

    def parent() -> Edits:
        return min(rng.choices(alive, k=2), key=lambda candidate: candidate.rank).edits

    def child() -> Edits:
        edits = (
            cross(parent(), parent(), max_edits=config.max_edits, rng=rng)
            if rng.random() < 0.5
            else parent()
        )
        return mutate(edits, sampler, rng=rng)

    candidates = sampler.batch(config.population, sampler.random_edits)
    while candidates:
        yield from reward_all(candidates)
        alive = sorted(alive + candidates, key=lambda candidate: candidate.rank)[
            : config.population
        ]
        candidates = sampler.batch(config.population, child)


def mutate(edits: Edits, sampler: Sampler, *, rng: random.Random) -> Edits:
    """Add, remove or replace a random edit."""
    change = rng.choice(("add", "remove", "replace")) if edits else "add"
    if change != "add":
        gone = rng.randrange(len(edits))
        edits = edits[:gone] + edits[gone + 1 :]
    return edits if change == "remove" else sampler.grow(edits)


def cross(one: Edits, other: Edits, *, max_edits: int, rng: random.Random) -> Edits:
    """Each edit of either parent with even odds, in random order; one that overlaps an earlier one
    is left out.
    """
    edits: Edits = ()
    for edit in rng.sample(one + other, len(one) + len(other)):
        if (
            len(edits) < max_edits
            and rng.random() < 0.5
            and not layer_mask(edit) & union_mask(edits)
        ):
            edits = (*edits, edit)
    return edits
