"""Rows of different programs as one batch, those of each program in a session of their own.

For where rows cannot run in lock-step (`Runner.together`): generation sees one batch.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from torch import Tensor

from ..program import Program
from .kv_cache import KvSession, RowCache

T = TypeVar("T")
Members = tuple[int, ...]


def groups_of(programs: Sequence[Program]) -> dict[Program, Members]:
    """Which rows run each program."""
    found: dict[Program, Members] = {}
    for row, program in enumerate(programs):
        found[program] = (*found.get(program, ()), row)
    return found


class GroupSession(RowCache):
    """Sessions of the rows of one program each, opened when the context is entered."""

    def __init__(
        self,
        opened: Sequence[tuple[Members, AbstractContextManager[KvSession]]],
        max_length: int,
    ) -> None:
        self.layers, self.max_length = [], max_length
        self._opened, self._stack = opened, ExitStack()
        self.groups: list[tuple[Members, KvSession]] = []

    def __enter__(self) -> "GroupSession":
        with ExitStack() as stack:
            self.groups = [(rows, stack.enter_context(one)) for rows, one in self._opened]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def gather(self, function: Callable[[KvSession, Members], Iterable[T]]) -> list[T]:
        """What `function` gives for the rows of each session, in the order of all rows."""
        found: dict[int, T] = {}
        for members, session in self.groups:
            found.update(zip(members, function(session, members), strict=True))
        return [found[row] for row in range(len(found))]

    @property
    def batch(self) -> int:
        return sum(len(members) for members, _ in self.groups)

    @property
    def programs(self) -> tuple[Program, ...]:
        """The program of each row."""
        return tuple(self.gather(lambda session, _: session.programs))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.gather(lambda session, _: session.lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams (beam search); beams of one prompt run one program."""
        order = beam_idx.tolist()
        for members, session in self.groups:
            place = {row: i for i, row in enumerate(members)}
            session.reorder_cache(beam_idx.new_tensor([place[order[row]] for row in members]))

    def __len__(self) -> int:
        return max(len(session) for _, session in self.groups)
