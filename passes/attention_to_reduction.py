"""Attention of a single query token becomes sums of products, fused with what stands around it.

The attention kernel is made for many queries: for one it costs a call, copies and small matrix
products, on the critical path of every step. Written out, it is three loops over the keys and
values, read once.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, copy_graph_module

aten = torch.ops.aten
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _arguments(node: Node) -> dict[str, Any]:
    defaults = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    return {**defaults, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _is_single_query(node: Node) -> bool:
    """Attention on the CPU of one row's one token, by static sizes, without what the rewriting does
    not spell out.
    """
    if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
        return False
    a = _arguments(node)
    query, key, value = (a[n].meta.get("val") for n in ("query", "key", "value"))
    if (
        not isinstance(query, torch.Tensor)
        or query.device.type != "cpu"
        or not query.dim() == key.dim() == value.dim() == 4
    ):
        return False
    sizes = (*query.shape, *key.shape, *value.shape)
    plain = not a["dropout_p"] and not a["is_causal"] and all(isinstance(s, int) for s in sizes)
    if not plain or query.shape[0] != 1 or query.shape[2] != 1 or query.shape[1] % key.shape[1]:
        return False
    if key.shape[0] != 1 or key.shape[:3] != value.shape[:3]:
        return False
    mask = a["attn_mask"]
    return mask is None or tuple(mask.meta["val"].shape) in (
        (1, 1, 1, key.shape[2]),
        (1, query.shape[1], 1, key.shape[2]),
    )


@dataclass(frozen=True)
class AttentionToReduction(Pass):
    """Rewrite scaled_dot_product_attention(q, k, v, mask) with q of one token as softmax(sum(q *
    k)) and a sum over v.

    Shapes: q [1, H*G, 1, E], k [1, H, L, E], v [1, H, L, F]; grouped heads stay grouped.
    Accumulates in at least float32.
    """

    name: ClassVar[str] = "attention-to-reduction"
    preserves_numerics: ClassVar[bool] = False  # the same products, summed in another order

    def run(self, gm: GraphModule) -> PassResult:
        if not any(_is_single_query(n) for n in gm.graph.nodes):
            return PassResult(gm, False)
        new, graph = copy_graph_module(gm)
        found = [n for n in graph.nodes if _is_single_query(n)]
        for node in found:
            with graph.inserting_before(node):
                node.replace_all_uses_with(self._reduce(graph, node))
            graph.erase_node(node)
        new.recompile()
        return PassResult(new, True, {"attentions rewritten": len(found)})

    @staticmethod
    def _reduce(graph: Graph, node: Node) -> Node:
        call, a = Caller(graph, node), _arguments(node)
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
            if mask.meta["val"].dtype == torch.bool:
                scores = call(aten.where.ScalarOther, seen, scores, float("-inf"))
            else:
                scores = call(aten.add.Tensor, scores, seen)
        weights = call(aten.unsqueeze.default, call(aten.softmax.int, scores, -1), -1)
        v = call.cast(
            call(aten.reshape.default, value, [heads, 1, length, value.meta["val"].shape[-1]]), wide
        )
        mixed = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, v), [-2])
        return call.cast(call(aten.reshape.default, mixed, list(result.shape)), result.dtype)
