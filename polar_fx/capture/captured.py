"""What a capture is: a flat graph, and the geometry of its KV slots."""

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

ALIGNMENT = 16  # slots are a multiple of so many columns long


@dataclass(frozen=True)
class KvSpec:
    """Geometry of one layer's slot: keys are [B, heads, L, key_size], values [B, heads, L,
    value_size].
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    def shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.heads, length, self.key_size), (
            batch,
            self.heads,
            length,
            self.value_size,
        )

    def bytes_per_token(self) -> int:
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(frozen=True)
class CapturedModel:
    """A model as a flat FX graph.

    Placeholders: `input_ids` i64[B, T], `positions` i64[B, T] (per-row token positions, also the KV
    index each token writes), `kv_index` i64[L] (0 .. L-1), then `kv_<layer>_0` (keys) and
    `kv_<layer>_1` (values),
    written in place. Output: logits [B, T, V]. Weights are get_attr nodes holding the model's own
    tensors.
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
