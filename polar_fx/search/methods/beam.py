"""Beam search: further edits of the best programs so far."""

import math
import random

from ...program import Program
from ..config import SearchConfig
from .edits import Candidate, Edits, Sampler, Search, reward_all


def beam(depth: int, config: SearchConfig, rng: random.Random) -> Search:
    """In each round, random single edits of the `beam_width` best programs so far.

    A round has its share of the budget, one in `max_edits`, so that the last one can reach programs
    of that many edits.
    """
    kept = [Candidate((), Program.identity(depth))]
    yield from reward_all(kept)
    sampler = Sampler(depth, config, rng=rng)
    share = math.ceil(config.simulations / config.max_edits)
    while growing := [
        candidate.edits for candidate in kept if len(candidate.edits) < config.max_edits
    ]:

        def propose(parents: list[Edits] = growing) -> Edits:
            return sampler.grow(rng.choice(parents))

        candidates = sampler.batch(share, propose)
        if not candidates:
            return
        yield from reward_all(candidates)
        kept = sorted(kept + candidates, key=lambda candidate: candidate.rank)[: config.beam_width]
