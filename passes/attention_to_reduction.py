"""Attention of a single query token becomes sums of products, fused with what stands around it.

The attention kernel is made for many queries: for one it costs a call, copies and small matrix
products, on the critical path of every step. Written out, it is three loops over the keys and
values, read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, replace_each

aten = torch.ops.aten
_ORDER = [0, 2, 1, 3, 4]  # of what is read from blocks, [B, W, H, C, E]
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def attention_arguments(node: Node) -> dict[str, Any]:
    """The arguments of scaled_dot_product_attention by name, with its defaults."""
    defaults = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    return {**defaults, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _is_single_query(node: Node) -> bool:
    """Attention on the CPU of one token a row, without what the rewriting does not spell out.

    Several rows, or a length that varies, are rewritten where keys are read by address: there the
    kernel would need a copy of them.
    """
    if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
        return False
    a = attention_arguments(node)
    query, key, value = (a[n].meta.get("val") for n in ("query", "key", "value"))
    if (
        not isinstance(query, torch.Tensor)
        or query.device.type != "cpu"
        or not query.dim() == key.dim() == value.dim() == 4
        or a["dropout_p"]
        or a["is_causal"]
    ):
        return False
    fixed = (*query.shape[1:], key.shape[1], key.shape[3], *value.shape[3:])
    if not all(isinstance(s, int) for s in fixed):
        return False
    if query.shape[2] != 1 or query.shape[1] % key.shape[1]:
        return False
    if blocks_of(a["key"]) is None and not (
        query.shape[0] == key.shape[0] == 1 and isinstance(key.shape[2], int)
    ):
        return False
    if (blocks_of(a["key"]) is None) != (blocks_of(a["value"]) is None):
        return False
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        return False
    mask = a["attn_mask"]
    if mask is None:
        return True
    if mask.meta["val"].dim() != 4:
        return False
    rows, heads, tokens, length = mask.meta["val"].shape
    return (rows, tokens, length) == (query.shape[0], 1, key.shape[2]) and heads in (
        1,
        query.shape[1],
    )


def blocks_of(key: Node) -> Node | None:
    """Keys [B, H, W, C, E] that are read as [B, H, W * C, E] from blocks of a store [P, H, C, E]
    (address_kv.py); None for keys of a slot, or in another order.
    """
    if key.target not in (aten.flatten.using_ints, aten.reshape.default, aten.view.default):
        return None
    source = key.args[0]
    if not isinstance(source, Node) or source.target is not aten.permute.default:
        return None
    read = source.args[0]
    if not isinstance(read, Node) or read.target is not aten.index.Tensor:
        return None
    store, indices = cast(tuple[Node, Sequence[Node | None]], read.args)
    if len(indices) != 1 or indices[0] is None or list(cast(Any, source.args[1])) != _ORDER:
        return None
    found, columns, blocks = (n.meta["val"] for n in (source, key, indices[0]))
    in_order = columns.dim() == 4 and columns.shape[:2] == found.shape[:2]
    if not in_order or columns.shape[3] != found.shape[4]:
        return None
    is_table = blocks.dim() == 2 and blocks.dtype == torch.long
    return source if is_table and store.meta["val"].dim() == 4 else None


def _masked(call: Caller, scores: Node, *, mask: Node) -> Node:
    """The scores of what is seen: a mask is boolean, or added."""
    if mask.meta["val"].dtype == torch.bool:
        return call(aten.where.ScalarOther, mask, scores, float("-inf"))
    return call(aten.add.Tensor, scores, mask)


@dataclass(frozen=True)
class AttentionToReduction(Pass):
    """Rewrite scaled_dot_product_attention(q, k, v, mask) with q of one token as softmax(sum(q *
    k)) and a sum over v.

    Shapes: q [B, H*G, 1, E], k [B, H, L, E], v [B, H, L, F]; grouped heads stay grouped.
    Accumulates in at least float32.
    """

    name: ClassVar[str] = "attention-to-reduction"
    preserves_numerics: ClassVar[bool] = False  # the same products, summed in another order

    def run(self, gm: GraphModule) -> PassResult:
        def reduce(graph: Graph, node: Node) -> Node:
            by_address = blocks_of(attention_arguments(node)["key"]) is not None
            return (self._reduce_blocks if by_address else self._reduce)(graph, node)

        return replace_each(gm, _is_single_query, make=reduce, what="attentions rewritten")

    @staticmethod
    def _reduce(graph: Graph, node: Node) -> Node:
        call, a = Caller(graph, node), attention_arguments(node)
        result = node.meta["val"]
        query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
        wide = torch.promote_types(result.dtype, torch.float32)
        _, heads, length, size = key.meta["val"].shape
        groups = query.meta["val"].shape[1] // heads
        scale = a["scale"] if a["scale"] is not None else size**-0.5
        q = call(aten.reshape.default, query, [heads, groups, 1, size])
        q = call(aten.mul.Tensor, call.cast(q, wide), scale)
        # made once
        q = call(
            aten.as_strided.default,
            call.dense(q),
            [heads, groups, 1, size],
            [groups * size, size, size, 1],
        )
        k = call.cast(call(aten.reshape.default, key, [heads, 1, length, size]), wide)
        scores = call(aten.sum.dim_IntList, call(aten.mul.Tensor, q, k), [-1])
        if mask is not None:
            seen = call(
                aten.reshape.default,
                mask,
                [heads, groups, length] if mask.meta["val"].shape[1] > 1 else [1, 1, length],
            )
            scores = _masked(call, scores, mask=seen)
        weights = call(aten.unsqueeze.default, call(aten.softmax.int, scores, -1), -1)
        v = call.cast(
            call(aten.reshape.default, value, [heads, 1, length, value.meta["val"].shape[-1]]), wide
        )
        mixed = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, v), [-2])
        return call.cast(call(aten.reshape.default, mixed, list(result.shape)), result.dtype)

    @staticmethod
    def _reduce_blocks(graph: Graph, node: Node) -> Node:
        """The same for any number of rows, over blocks of a store [B, H, W, C, E].

        The blocks stay two axes: the compiler then reads whole rows of keys and values at a time.
        """
        call, a = Caller(graph, node), attention_arguments(node)
        result = node.meta["val"]
        query, mask = a["query"], a["attn_mask"]
        key, value = blocks_of(a["key"]), blocks_of(a["value"])
        assert key is not None and value is not None
        wide = torch.promote_types(result.dtype, torch.float32)
        heads, block, size = key.meta["val"].shape[1], *key.meta["val"].shape[3:]
        groups = query.meta["val"].shape[1] // heads
        scale = a["scale"] if a["scale"] is not None else size**-0.5
        q = call(aten.reshape.default, query, [-1, heads, groups, 1, 1, size])
        q = call.dense(call(aten.mul.Tensor, call.cast(q, wide), scale))
        k = call.cast(call(aten.unsqueeze.default, key, 2), wide)
        scores = call(aten.sum.dim_IntList, call(aten.mul.Tensor, q, k), [-1])  # [B, H, G, W, C]
        scores = call(aten.flatten.using_ints, scores, 3, 4)
        if mask is not None:
            seen = mask
            if mask.meta["val"].shape[1] > 1:
                seen = call(aten.squeeze.dim, mask, 2)
                seen = call(aten.unflatten.int, seen, 1, [heads, groups])
            scores = _masked(call, scores, mask=seen)
        weights = call(aten.softmax.int, scores, -1)
        weights = call(aten.unflatten.int, weights, 3, [-1, block])
        weights = call(aten.unsqueeze.default, weights, -1)
        v = call.cast(call(aten.unsqueeze.default, value, 2), wide)
        mixed = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, v), [-3, -2])
        mixed = call(aten.reshape.default, mixed, [-1, heads * groups, 1, result.shape[3]])
        return call.cast(mixed, result.dtype)
