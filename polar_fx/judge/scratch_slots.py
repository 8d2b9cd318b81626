"""Slots for the steps of one batch at a time: filled before a step, and read out after it.

Shape legend: T tokens, L KV length, H KV heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture import KvSpec
from ..library.symbols import SymbolTable


@dataclass(frozen=True)
class Found:
    """What a step finds in its slot for one row, whose tokens take the columns `tokens`: the parts
    `prefix` that the tokens before these left there, and, of a layer that reads another's keys and
    values, those of the tokens themselves, `read` [H, T, E].
    """

    tokens: slice
    prefix: Sequence[Tensor]
    read: Sequence[Tensor]


class ScratchSlots:
    """One slot of each geometry, L columns long, for as many rows as were asked for at a time."""

    def __init__(self, table: SymbolTable, length: int, *, device: torch.device) -> None:
        self.table, self.length, self.device = table, length, device
        self.owners = frozenset(table.owners.values())  # layers whose keys and values others read
        self._slots: dict[KvSpec, tuple[int, tuple[Tensor, ...]]] = {}  # rows that fit, and parts

    def filled(self, layer: int, rows: Sequence[Found]) -> tuple[Tensor, ...]:
        """The slot of a step of the layer: what the rows find there, and zeros after that."""
        spec, size = self.table.slot_spec(layer), len(rows)
        known, own = self._slots.get(spec, (0, ()))
        if known < size:
            made = spec.slot(size, length=self.length, device=self.device)
            known, own = self._slots[spec] = size, made
        slot = tuple(part[:size] for part in own)
        for part in slot:
            part.zero_()  # a NaN left there would reach these rows behind their masks
        for i, row in enumerate(rows):
            if row.prefix:
                held = spec.held(slot, row.tokens.start)
                for part, before in zip(held, row.prefix, strict=True):
                    part[i] = before
            for part, new in zip(slot, row.read, strict=False):
                part[i, :, row.tokens] = new
        return slot

    def kept(self, layer: int, tokens: slice, *, slot: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a step of the layer has left in one row's slot of its tokens: keys and values
        [H, T, E], and states.
        """
        spec = self.table.kv_specs[layer]
        kv, states = slot[: spec.num_kv], slot[spec.num_kv : len(spec.roles)]
        kept = [part[:, tokens] for part in kv]
        return tuple(part.clone() for part in (*kept, *states))
