"""Drives a search with a function for a model, and the functions."""

from collections.abc import Callable
from difflib import SequenceMatcher

from polar_fx.program import Program
from polar_fx.search.methods.edits import Search

HIDDEN = Program.parse("skip 3, repeat 7-8", depth=12)


def drive(search: Search, reward: Callable[[Program], float]) -> list[Program]:
    """All programs the search looked at, in order."""
    programs: list[Program] = []
    batch = next(search)
    while True:
        assert batch, "a search asked for nothing"
        programs += batch
        try:
            batch = search.send([reward(program) for program in batch])
        except StopIteration:
            return programs


def constant(program: Program) -> float:
    return 0.0


def likeness(program: Program) -> float:
    """Of a path to the hidden one; 1 only where they are equal."""
    return SequenceMatcher(None, program.path, HIDDEN.path, autojunk=False).ratio()


def sparse(program: Program) -> float:
    """1 for about one program in 35 of 400 random ones: layer 3 does not run and layer 8 runs
    twice.
    """
    return float(3 not in program.path and program.path.count(8) == 2)
