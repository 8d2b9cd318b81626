"""What a capture is: a flat graph, and the geometry of its slots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

ALIGNMENT = 16  # slots are a multiple of so many columns long


# A call brings at most so many tokens a row where layers keep state: recurrences are computed for
# all pairs of tokens.
MOST_STATE_TOKENS = 512


@dataclass(frozen=True)
class StateSpec:
    """One state [B, *size] that a step keeps however long a row is, such as the last inputs of a
    convolution. Zeros stand for no tokens.
    """

    size: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ColumnsSpec:
    """One part of a slot that grows with the row: [B, heads, L, size]."""

    heads: int
    size: int
    dtype: torch.dtype

    def bytes_per_token(self) -> int:
        """Bytes of one token."""
        return self.heads * self.size * self.dtype.itemsize


@dataclass(frozen=True)
class KvSpec:
    """Geometry of one layer's slot: keys are [B, heads, L, key_size], values [B, heads, L,
    value_size]; then come `more_columns`: the keys and the values of each further attention of the
    layer, and keys by which it chooses the tokens that it attends to. Last come states. A layer
    without attention has no heads and no keys and values.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    states: tuple[StateSpec, ...] = ()
    more_columns: tuple[ColumnsSpec, ...] = ()

    @property
    def columns(self) -> tuple[ColumnsSpec, ...]:
        """The parts of the slot that grow with the row, which come first."""
        sizes = (self.key_size, self.value_size) if self.heads else ()
        return (*(ColumnsSpec(self.heads, n, self.dtype) for n in sizes), *self.more_columns)

    @property
    def num_kv(self) -> int:
        """How many parts of the slot grow with the row."""
        return len(self.columns)

    @property
    def roles(self) -> tuple[str, ...]:
        """What each part of the slot is to a graph."""
        return ("kv",) * self.num_kv + ("state",) * len(self.states)

    def shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
        """Those of the parts of a slot."""
        kv = tuple((batch, part.heads, length, part.size) for part in self.columns)
        return (*kv, *((batch, *state.size) for state in self.states))

    def slot(self, batch: int, *, length: int, device: torch.device) -> tuple[Tensor, ...]:
        """An empty slot: the parts of `shapes`, all zeros."""
        # zeros, not empty: masked columns are multiplied by zero, and 0 * NaN is NaN
        return tuple(
            torch.zeros(shape, dtype=part.dtype, device=device)
            for shape, part in zip(
                self.shapes(batch, length), (*self.columns, *self.states), strict=True
            )
        )

    def held(self, slot: Sequence[Tensor], columns: int) -> list[Tensor]:
        """What a slot holds of the first `columns` columns: views up to there of the parts that
        have columns, and the states.
        """
        kv, states = slot[: self.num_kv], slot[self.num_kv :]
        return [*(part[:, :, :columns] for part in kv), *states]

    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return sum(part.bytes_per_token() for part in self.columns)

    def state_bytes(self) -> int:
        """Bytes of the states of one row."""
        return sum(math.prod(state.size) * state.dtype.itemsize for state in self.states)


@dataclass(frozen=True)
class CapturedModel:
    """A model as a flat FX graph.

    Placeholders: `input_ids` i64[B, T], `positions` i64[B, T] (per-row token positions, also the KV
    index each token writes; tokens at the last one are padding), `kv_index` i64[L] (0 .. L-1), then
    the parts of each layer's slot, which are written in place: keys `kv_<layer>_0`, values
    `kv_<layer>_1`, further columns `kv_<layer>_<part>`, and states `state_<layer>_<part>`. Output:
    logits [B, T, V]. Weights are get_attr nodes holding the model's own tensors.
    """

    graph_module: GraphModule
    depth: int
    kv_specs: tuple[KvSpec, ...]
    layer_path: str
    seconds: float

    @property
    def device(self) -> torch.device:
        return next(self.graph_module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.graph_module.parameters() if p.is_floating_point())
