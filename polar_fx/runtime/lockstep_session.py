"""Rows in lock-step as transformers' generation sees them: one cache of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import ProgramError
from ..program import Program
from .kv_cache import RowCache
from .lockstep_rows import RowBatch
from .token_rows import padded


@dataclass(frozen=True, eq=False)
class After:
    """Where the prefill of some rows goes on: after the first `num_steps` steps of each, whose keys
    and values are there.

    `hidden` holds the hidden states [T, d] of each row after them.
    """

    num_steps: int
    hidden: list[Tensor]

    def take(self, rows: Sequence[int]) -> "After":
        """The same for some of the rows."""
        return After(self.num_steps, [self.hidden[row] for row in rows])

    def chunk(self, start: int, tokens: int) -> tuple[int, Tensor]:
        """The number of steps, and the hidden states [B, tokens, d] from a token on; zeros stand
        for those that are not there.
        """
        parts = [hidden[start : start + tokens] for hidden in self.hidden]
        return self.num_steps, padded(parts, tokens)


class LockstepSession(RowCache):
    """Some rows, a program each, and what they hold. A context manager: at its end all is given
    back.

    If the rows' first steps have run already, `after` says where their prefill goes on; the prefill
    clears it.
    """

    def __init__(self, rows: RowBatch, max_length: int, *, after: After | None = None) -> None:
        self.layers, self.rows, self.max_length, self.after = [], rows, max_length, after
        self._singles: dict[int, RowBatch] = {}

    def __enter__(self) -> "LockstepSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.rows.close()

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.rows.programs

    def single(self, row: int) -> RowBatch:
        """One row as a batch of its own."""
        if row not in self._singles:
            self._singles[row] = RowBatch(self.rows.rows[row : row + 1])
        return self._singles[row]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.rows.lengths

    # ---- what transformers' generation asks of a cache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams (beam search); beams of one prompt run one program.

        Raises ProgramError for a row that would go on with another program.
        """
        rows = self.rows.rows
        moved = [(rows[i], rows[j]) for i, j in enumerate(beam_idx.tolist()) if i != j]
        for row, source in moved:
            if row.program != source.program:
                raise ProgramError(f"a beam went from {source.program} to {row.program}")
        branches = [source.branch() for _, source in moved]
        for (row, _), branch in zip(moved, branches, strict=True):
            row.become(branch)

    def __len__(self) -> int:
        return max(program.num_steps for program in self.rows.programs)
