"""Step-keyed static pool of slots with one position per row.

HuggingFace caches key a slot by the layer's own number; a layer that runs twice would then append
twice to one slot. Here every executed step owns a slot, and the pool, not slot 0, knows how long
each row is: skipping layer 0 is legal, and rows of one batch may have any mix of lengths. A slot
holds keys and values, states of recurrences and convolutions, or both.

Shape legend: B batch, T tokens, L allocated length, H KV heads, E head size.
"""

import bisect
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from ..capture import KvSpec
from ..capture.captured import ALIGNMENT
from ..errors import KvOverflowError, ProgramError
from ..program import Program
from .on_device import on_device

# Bytes of the slots that a GPU fills whole, many in one launch, rather than what was written of
# each: that takes less than their launches would.
_MOST_FILLED_WHOLE = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    serial: int
    batch: int  # rows that fit
    parts: tuple[Tensor, ...]


class KvPool:
    """Slots of tensors [B, H, L, E], and of states [B, ...], allocated on first use and handed out
    to one session at a time.

    `max_length` tokens fit a row. One column more is allocated (rounded up to 16): padding tokens
    of a ragged batch write there, and no mask ever shows it.
    """

    def __init__(self, max_length: int, device: torch.device) -> None:
        self.max_length = max_length
        self.length = -(-(max_length + 1) // ALIGNMENT) * ALIGNMENT
        self.device = device
        self.kv_index = torch.arange(self.length, device=device)
        self._free: dict[KvSpec, list[_Slot]] = defaultdict(list)
        self._lock = threading.Lock()
        self._allocated: dict[int, _Slot] = {}
        self._serial = 0

    @property
    def num_slots(self) -> int:
        """Slots ever allocated and still held."""
        return len(self._allocated)

    @property
    def num_bytes(self) -> int:
        """Bytes of those slots."""
        return sum(t.nbytes for slot in tuple(self._allocated.values()) for t in slot.parts)

    @torch.inference_mode(False)  # slots outlive the mode they are first asked for in
    def _take(self, spec: KvSpec, batch: int) -> _Slot:
        with self._lock:
            free = self._free[spec]
            for i, slot in enumerate(free):
                if slot.batch >= batch:
                    return free.pop(i)
            for slot in free:  # too small for this batch: make room before allocating larger ones
                del self._allocated[slot.serial]
            free.clear()
            parts = spec.slot(batch, length=self.length, device=self.device)
            self._serial += 1
            slot = self._allocated[self._serial] = _Slot(self._serial, batch, parts)
            return slot

    @contextmanager
    def session(
        self, program: Program, specs: Sequence[KvSpec], *, batch: int
    ) -> "Iterator[KvSession]":
        """A session of `batch` empty rows of `program`, a slot a spec; the slots return to the pool
        at the end.
        """
        taken = [self._take(spec, batch) for spec in specs]
        slots: list[tuple[Tensor, ...]] = []
        for slot in taken:
            slots.append(tuple(part[:batch] for part in slot.parts))
        session = KvSession(self, program, slots=slots, specs=specs, batch=batch)
        try:
            yield session
        finally:
            session.clear()
            with self._lock:
                for spec, slot in zip(specs, taken, strict=True):
                    # in order of allocation: programs then meet the same slots again, whatever ran
                    # in between, and a CUDA graph captured on them can be replayed
                    bisect.insort(self._free[spec], slot, key=lambda s: s.serial)


@dataclass(frozen=True, slots=True, eq=False)
class Resume:
    """Where a pass goes on: after the first `num_steps` steps, whose keys and values are there.

    `hidden` [B, T, d] are the hidden states after them, zeros after a row's own tokens. None of
    these steps may open a blend.
    """

    num_steps: int
    hidden: Tensor

    def chunk(self, start: int, tokens: int) -> "Resume":
        """The same for tokens `start` to `start + tokens - 1`; zeros stand for those that are not
        there.
        """
        part = self.hidden[:, start : start + tokens]
        missing = tokens - part.shape[1]
        part = pad(part, (*(0, 0) * (part.dim() - 2), 0, missing)) if missing else part.contiguous()
        return Resume(self.num_steps, part)


class RowCache(Cache):
    """Rows and how long each is, as a transformers `Cache`: generation utilities may carry it
    around; they never index it.

    Subclasses set `max_length`, the tokens that a row may hold, and give `lengths`.
    """

    is_compileable = False  # type: ignore[assignment]
    max_length: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        raise NotImplementedError

    @property
    def programs(self) -> tuple[Program, ...]:
        """The program of each row."""
        raise NotImplementedError

    def require_program(self, program: Program) -> None:
        """Raise ProgramError unless every row was opened for this program."""
        for opened_for in self.programs:
            require_program(opened_for, program)

    def require(self, counts: Sequence[int]) -> None:
        """Raise KvOverflowError unless every row has room for counts[b] more tokens."""
        for row, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if start + count > self.max_length:
                raise KvOverflowError(
                    f"row {row} needs {start + count} token positions but the KV pool holds "
                    f"{self.max_length}; shorten the prompt, lower max_new_tokens, or "
                    f"compile with max_length={start + count} or more"
                )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.max_length

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("slots are written by compiled steps, not through Cache.update")


def require_program(opened_for: Program, program: Program) -> None:
    """Raise ProgramError unless a session opened for one program is to run that one."""
    if opened_for is not program and opened_for != program:
        raise ProgramError(
            f"the session was opened for program {opened_for}, and program {program} is to run "
            "in it; open a session for that one"
        )


class KvSession(RowCache):
    """What one running batch of `program` holds: a slot per step, whose geometry `specs` tell, and
    a length per row.

    If the rows' first steps have run already, `resume` says where their prefill goes on; the
    prefill clears it.

    Lengths are kept twice: as numbers, to refuse what does not fit without asking the device, and
    on the device, where the positions of a decoded token are made of them without a copy from the
    host or a wait.

    It is a transformers `Cache`, so that generation utilities may carry it around; they never index
    it.
    """

    def __init__(
        self,
        pool: KvPool,
        program: Program,
        *,
        slots: list[tuple[Tensor, ...]],
        specs: Sequence[KvSpec],
        batch: int,
        next_positions: Tensor | None = None,
    ) -> None:
        self.layers, self.max_length = [], pool.max_length
        self.pool, self.program, self.slots, self.specs = pool, program, slots, tuple(specs)
        self.resume: Resume | None = None
        self._lengths = [0] * batch
        if next_positions is None:
            # or it could not be advanced outside of inference mode
            with torch.inference_mode(False):
                next_positions = torch.zeros(batch, 1, dtype=torch.long, device=pool.device)
        self._next = next_positions  # i64[B, 1], the lengths on the device
        # the tokens of each row, for a runner that may have to run a row anew
        self._tokens: list[list[Tensor]] = [[] for _ in range(batch)]
        self._written = 0  # columns 0 .. _written - 1 may hold something

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; `advance` changes them."""
        return list(self._lengths)

    @property
    def batch(self) -> int:
        return len(self._lengths)

    @property
    def programs(self) -> tuple[Program, ...]:
        """The program of each row."""
        return (self.program,) * self.batch

    def row(self, index: int) -> "KvSession":
        """One row as a session of its own, on the same storage; lengths flow back through
        `advance`.
        """
        return _Row(self, index)

    def positions(self, counts: Sequence[int], tokens: int | None = None) -> Tensor:
        """Positions i64[B, T] of the next counts[b] tokens of each row, T = max(counts).

        Padding (beyond a row's count) is sent to the spare last column. `tokens` may ask for more
        than the longest row has. Where all rows have T tokens, nothing is copied from the host.
        Raises KvOverflowError before anything is written if a row would exceed the pool.
        """
        self.require(counts)
        tokens = max(counts) if tokens is None else tokens
        ends = [start + n for start, n in zip(self._lengths, counts, strict=True)]
        padded = min(counts) < tokens
        self.will_write(self.pool.length if padded else max(ends))
        if tokens == 1 and not padded:
            return self._next.clone()  # the caller's own: `advance` changes the other in place
        columns = (
            self.pool.kv_index[:tokens]
            if tokens <= self.pool.length
            else torch.arange(tokens, device=self.pool.device)
        )
        places = self._next + columns
        if not padded:
            return places
        return torch.where(
            columns < on_device(counts, self.pool.device)[:, None], places, self.pool.length - 1
        )

    def advance(self, counts: Sequence[int]) -> None:
        """The tokens of the last `positions(counts)` are there now."""
        self._lengths = [a + b for a, b in zip(self._lengths, counts, strict=True)]
        first = counts[0]
        self._next += (
            first
            if all(n == first for n in counts)
            else on_device(counts, self.pool.device)[:, None]
        )

    def keep(self, ids: Tensor, counts: Sequence[int]) -> None:
        """Keep the tokens that are about to be added, the first counts[b] of ids i64[B, T]."""
        for kept, row, count in zip(self._tokens, ids, counts, strict=True):
            if count:
                kept.append(row[:count].clone())

    def restart(self) -> Tensor:
        """The kept tokens i64[T] of the only row, which is empty after this."""
        (kept,) = self._tokens
        tokens = torch.cat(kept)
        kept.clear()
        for spec, slot in zip(self.specs, self.slots, strict=True):
            for state in slot[spec.num_kv :]:
                state.zero_()
        self.advance([-self._lengths[0]])
        return tokens

    def will_write(self, columns: int) -> None:
        """Note that the first `columns` columns of the slots are about to be written."""
        self._written = max(self._written, columns)

    @property
    def num_written(self) -> int:
        """How many columns, from the first, may hold something."""
        return self._written

    def clear(self) -> None:
        """Zero what was written: a later session must not meet the NaN of this one behind its mask
        (0 * NaN is NaN).
        """
        parts = [part for slot in self.slots for part in slot]
        on_gpu = self.pool.device.type == "cuda" and self._written > 0
        if not on_gpu or sum(p.nbytes for p in parts) > _MOST_FILLED_WHOLE:
            each = zip(self.specs, self.slots, strict=True)
            held = [spec.held(slot, self._written) for spec, slot in each]
            parts = [part for slot in held for part in slot]
        if parts:
            torch._foreach_zero_(parts)

    # ---- what transformers' generation asks of a cache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams (beam search)."""
        order = beam_idx.tolist()
        for slot in self.slots:
            for part in slot:
                part.copy_(part.index_select(0, beam_idx.to(part.device)))
        self._lengths = [self._lengths[i] for i in order]
        self._tokens = [list(self._tokens[i]) for i in order]
        self._next.copy_(self._next.index_select(0, beam_idx.to(self._next.device)))

    def __len__(self) -> int:
        return len(self.slots)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "assisted generation is not supported: a session cannot be cropped"
        )


class _Row(KvSession):
    def __init__(self, parent: KvSession, index: int) -> None:
        own = slice(index, index + 1)
        slots: list[tuple[Tensor, ...]] = []
        for slot in parent.slots:
            slots.append(tuple(part[own] for part in slot))
        super().__init__(
            parent.pool,
            parent.program,
            slots=slots,
            specs=parent.specs,
            batch=1,
            next_positions=parent._next[own],
        )
        self._parent, self._index = parent, index
        if parent.resume is not None:
            self.resume = Resume(parent.resume.num_steps, parent.resume.hidden[own])
        self._lengths = [parent.lengths[index]]
        self._tokens = [parent._tokens[index]]

    def advance(self, counts: Sequence[int]) -> None:
        super().advance(counts)
        self._parent._lengths[self._index] = self._lengths[0]

    def will_write(self, columns: int) -> None:
        self._parent.will_write(columns)
