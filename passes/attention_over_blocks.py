"""Attention over blocks of a store becomes one operator, for which backends have a kernel that
reads the blocks where they lie and leaves out what no token sees.

For several tokens, torch's kernel takes keys and values as one tensor, which has to be gathered
from the blocks first; it computes scores under a mask whether any of them is seen or not; and in
float32 it multiplies by MKL, which is slow on processors other than Intel's. For one token a row,
reductions read values once for each vector of their numbers and each head of the query
(docs/performance.md has the figures).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .attention_to_reduction import attention_arguments, blocks_of
from .base import Caller, Pass, PassResult, replace_each

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)
MOST_OF_A_HEAD = 256  # the largest size of a head of queries and keys, or of values


@torch.library.custom_op("polar_fx::block_attention", mutates_args=())
def block_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of query [B, T, H*G, E] to the columns of `blocks` i64[B, W] in the stores key
    [P, H, C, E] and value [P, H, C, F]: [B, T, H*G, F], of the query's dtype.

    `mask` [B or 1, H*G or 1, T, W*C] is boolean (true: seen) or added to the scores; all operands
    are contiguous. The values of torch.nn.functional.scaled_dot_product_attention; backends may
    have a kernel of their own for it.
    """

    def columns(store: Tensor) -> Tensor:
        return store[blocks].permute(0, 2, 1, 3, 4).flatten(2, 3)

    found = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        columns(key),
        columns(value),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return found.transpose(1, 2).contiguous()


@cast(Any, block_attention).register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _fits(query: Tensor, stores: Sequence[Tensor]) -> bool:
    """Whether the kernel is made for a query [B, H*G, T, E] and stores [P, H, C, .] like these."""
    heads, (_, stored_heads, columns, _) = query.shape[1], stores[0].shape
    sizes = query.shape[3], *(store.shape[3] for store in stores)
    known = cast(Sequence[int | torch.SymInt], (heads, stored_heads, columns, *sizes))
    if not all(isinstance(size, int) for size in known):
        return False
    if query.device.type != "cpu" or query.dtype not in DTYPES:
        return False
    if any(store.dtype != query.dtype or not store.is_contiguous() for store in stores):
        return False
    if heads % stored_heads or stores[1].shape[1] != stored_heads or columns % 2:
        return False
    if _is_faster_by_torch(query, stored_heads):
        return False
    return all(size % 2 == 0 and 0 < size <= MOST_OF_A_HEAD for size in sizes)


def _is_faster_by_torch(query: Tensor, stored_heads: int) -> bool:
    """Whether it is of several tokens in bfloat16, and each head has keys of its own: torch's
    kernel has the same products, and there is nothing that heads could share.
    """
    heads, tokens = cast(Sequence[int | torch.SymInt], query.shape[1:3])
    several = not isinstance(tokens, int) or tokens > 1
    return several and query.dtype == torch.bfloat16 and heads == stored_heads


def _is_over_blocks(node: Node) -> bool:
    """Attention on the CPU whose keys and values are read from the same blocks of two stores."""
    if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
        return False
    a = attention_arguments(node)
    if a["dropout_p"] or a["is_causal"]:
        return False
    if blocks_of(a["key"]) is None or blocks_of(a["value"]) is None:
        return False
    (key, blocks), (value, others) = (_store_and_blocks(a[n]) for n in ("key", "value"))
    if key is value or blocks is not others:
        return False
    query, columns = (a[n].meta["val"] for n in ("query", "key"))
    if query.dim() != 4 or query.shape[0] != columns.shape[0]:
        return False
    if a["attn_mask"] is not None:
        mask = a["attn_mask"].meta["val"]
        if mask.dim() != 4 or mask.shape[2:] != (query.shape[2], columns.shape[2]):
            return False
        if mask.dtype not in (torch.bool, query.dtype):
            return False
    return _fits(query, [key.meta["val"], value.meta["val"]])


def _store_and_blocks(columns: Node) -> tuple[Node, Node]:
    """The store, and the numbers of the blocks i64[B, W] that are read of it, of what `blocks_of`
    found to be columns of blocks.
    """
    permuted = cast(Node, blocks_of(columns))
    store, (blocks,) = cast(Any, permuted.args[0]).args
    return store, blocks


@dataclass(frozen=True)
class AttentionOverBlocks(Pass):
    """Rewrite scaled_dot_product_attention(q, k, v, mask) whose keys and values are read from
    blocks, as `block_attention` of the stores and the numbers of the blocks.
    """

    name: ClassVar[str] = "attention-over-blocks"
    preserves_numerics: ClassVar[bool] = False  # sums in another order

    def run(self, gm: GraphModule) -> PassResult:
        return replace_each(gm, _is_over_blocks, make=_by_blocks, what="attentions rewritten")


def _by_blocks(graph: Graph, node: Node) -> Node:
    call, a = Caller(graph, node), attention_arguments(node)
    query = call(aten.transpose.int, a["query"], 1, 2)
    key, blocks = _store_and_blocks(a["key"])
    value, _ = _store_and_blocks(a["value"])
    mask = a["attn_mask"]
    scale = a["scale"] if a["scale"] is not None else query.meta["val"].shape[3] ** -0.5
    found = call(
        torch.ops.polar_fx.block_attention.default,
        call.dense(query),
        key,
        value,
        call.dense(blocks),
        mask if mask is None else call.dense(mask),
        scale,
    )
    return call(aten.transpose.int, found, 1, 2)
