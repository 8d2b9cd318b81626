"""Attention over keys and values that lie in blocks of a store, and operands for it.

Shape legend: B rows, T tokens, H heads of keys, G heads of the query for each, E and F sizes of a
head of keys and of values, C columns of a block, W blocks of a row, L = W * C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from polar_fx.passes.address_kv import BLOCK

# The axes of `operands` that may vary
DYNAMIC = (
    {0: "batch", 1: "tokens"},
    {0: "stored"},
    {0: "stored"},
    {0: "batch", 1: "blocks"},
    {0: "batch", 2: "tokens", 3: f"{BLOCK}*blocks"},
)


def attention(operands: Sequence[Tensor], *, scale: float = 0.3) -> Tensor:
    """As a layer whose keys and values are read by address has it: of query [B, T, H*G, E] over
    the stores [P, H, C, E] and [P, H, C, F] at i64[B, W], perhaps under a mask: [B, H*G, T, F].
    """
    query, key, value, blocks, *masks = operands
    return scaled_dot_product_attention(
        query.transpose(1, 2),
        columns(key, blocks),
        columns(value, blocks),
        attn_mask=masks[0] if masks else None,
        scale=scale,
        enable_gqa=True,
    )


def columns(store: Tensor, blocks: Tensor) -> Tensor:
    """[B, H, L, E] of a store [P, H, C, E]."""
    return store[blocks].permute(0, 2, 1, 3, 4).flatten(2, 3)


def operands(
    *,
    rows: int = 2,
    tokens: int = 5,
    blocks: int = 2,
    heads: int = 2,
    groups: int = 3,
    size: int = 16,
    value_size: int | None = None,
    block: int = BLOCK,
    dtype: torch.dtype = torch.float32,
    mask: bool = True,
    mask_heads: bool = False,
    added: bool = False,
    mask_rows: bool = True,
) -> list[Tensor]:
    """Query, keys, values, blocks and, if wanted, a mask under which each token sees the columns up
    to some place: boolean, or with what is added to scores.
    """
    generator = torch.Generator().manual_seed(rows * tokens + blocks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    stored, length = rows * blocks + 3, blocks * block
    made = [
        normal(rows, tokens, heads * groups, size).to(dtype),
        normal(stored, heads, block, size).to(dtype),
        normal(stored, heads, block, value_size or size).to(dtype),
        torch.randperm(stored, generator=generator)[: rows * blocks].view(rows, blocks),
    ]
    if not mask:
        return made
    of = (rows if mask_rows else 1, heads * groups if mask_heads or added else 1, tokens)
    last = torch.randint(0, length, (*of, 1), generator=generator)
    seen = torch.arange(length) <= last
    if not added:
        return [*made, seen]
    return [*made, torch.where(seen, normal(*of, length), float("-inf")).to(dtype)]
