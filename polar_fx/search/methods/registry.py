"""The search methods by name."""

import hashlib

from ...errors import InputError
from .beam import beam
from .edits import Method
from .evolution import evolution
from .mcts import mcts
from .scan import random_search, scan

METHODS: dict[str, Method] = {
    "mcts": mcts,
    "scan": scan,
    "random": random_search,
    "beam": beam,
    "evolution": evolution,
}


def get_method(name: str) -> Method:
    """A method by name. Raises InputError naming the known ones."""
    if name not in METHODS:
        raise InputError(f"unknown search method {name!r}; use one of {', '.join(METHODS)}")
    return METHODS[name]


def question_seed(seed: int, question_id: str) -> int:
    """The seed of one question's search.

    With a seed shared by all, all look at the same programs and some seem to suit many questions
    (RE-PoLar: the best covered 51 % of them, with a seed each 4 %).
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {question_id}".encode()).digest()[:8])
