"""Rows of different programs as one batch that runs row by row.

For where rows cannot run in lock-step (`Runner.open_rows`): each has a session of its own, and
generation sees one batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor

from .kv_cache import KvSession, RowCache


class RowsApart(RowCache):
    """Sessions of one row each, opened when the context is entered."""

    def __init__(
        self, opened: Sequence[AbstractContextManager[KvSession]], max_length: int
    ) -> None:
        self.layers, self.max_length = [], max_length
        self._opened, self._stack = opened, ExitStack()
        self.sessions: list[KvSession] = []

    def __enter__(self) -> "RowsApart":
        with ExitStack() as stack:
            self.sessions = [stack.enter_context(one) for one in self._opened]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def batch(self) -> int:
        return len(self.sessions)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [session.lengths[0] for session in self.sessions]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams (beam search); beams of one prompt run one program."""
        order = beam_idx.tolist()
        moved = [(row, source) for row, source in enumerate(order) if row != source]
        taken = {source: self.sessions[source].copied() for _, source in moved}
        for row, source in moved:
            self.sessions[row].restore(taken[source])

    def __len__(self) -> int:
        return max(len(session) for session in self.sessions)
