"""Hidden states between the layers of a flat graph, all of one form, so that layers may be called
in any order and rows and tokens are found in each: one dtype, and axes [B, T, ...].

Shape legend: B batch, T tokens, S streams, d hidden size.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch.fx import GraphModule, Node

from .base import Caller, copy_graph_module, role, storage, writes
from .layer_stack import Stack, refused
from .torch_types import size_expression

_Change = Callable[[Caller, Node], Node]


def in_one_dtype(gm: GraphModule) -> GraphModule:
    """The graph with a hidden state of one dtype between layers, the widest that it has there.

    A layer that takes another one gets it so, and what it hands on is widened: nothing changes for
    the model itself, and layers may be called in any order.
    """
    dtypes = [hidden.meta["val"].dtype for hidden in Stack(gm).hidden]
    widest = reduce(torch.promote_types, dtypes)

    def cast_to(dtype: torch.dtype) -> _Change:
        return lambda call, node: call.cast(node, dtype)

    return _handed_on_as(
        gm, [None if d == widest else (cast_to(widest), cast_to(d)) for d in dtypes]
    )


def rows_and_tokens_first(gm: GraphModule) -> GraphModule:
    """The graph with hidden states [B, T, ...] between layers, without gaps.

    Several streams side by side, such as [S, B, T, d], are permuted to [B, T, S, d], and back where
    they are read: nothing changes for the model itself. Raises PassError for a hidden state that
    has no axis of rows, or none of tokens.
    """
    sizes = _rows_and_tokens(gm)
    orders = [_rows_first(hidden, sizes) for hidden in Stack(gm).hidden]
    return _handed_on_as(gm, [_permuted(order) for order in orders])


def _handed_on_as(
    gm: GraphModule, changes: Sequence[tuple[_Change, _Change] | None]
) -> GraphModule:
    """The graph with one change for each hidden state: what is done to it where it is made, and to
    the result of that where it is read.
    """
    if not any(changes):
        return gm
    new, graph = copy_graph_module(gm)
    stack = Stack(new)
    readers = (*stack.layers, stack.after)
    for hidden, nodes, change in zip(stack.hidden, readers, changes, strict=True):
        if change is None:
            continue
        there, back = change
        with graph.inserting_before(_last_write(new, hidden).next):
            handed_on = there(Caller(graph, hidden), hidden)
            taken = back(Caller(graph, nodes[0]), handed_on)
        hidden.replace_all_uses_with(taken, delete_user_cb=set(nodes).__contains__)
    new.recompile()
    return new


def _last_write(gm: GraphModule, hidden: Node) -> Node:
    """The last node that writes into the memory of a hidden state before it is handed on: the layer
    that made it may write into a part of it afterwards.
    """
    memory, layer, last = storage(hidden), hidden.meta.get("layer"), hidden
    for node in gm.graph.nodes:
        if writes(node) and node.meta.get("layer") == layer and storage(node) is memory:
            last = max(last, node)
    return last


def _rows_and_tokens(gm: GraphModule) -> tuple[object, object] | None:
    """The sizes of rows and of tokens, as those of the token ids; None if there are none."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if role(node) == "input" and node.meta["val"].dim() == 2:
            rows, tokens = map(_key, node.meta["val"].shape)
            return rows, tokens
    return None


def _key(size: int | torch.SymInt) -> object:
    """What equal sizes have in common for any rows and tokens."""
    return str(size_expression(size)) if isinstance(size, torch.SymInt) else size


def _rows_first(hidden: Node, sizes: tuple[object, object] | None) -> list[int]:
    """The axes of a hidden state with those of rows and of tokens first."""
    found = list(map(_key, hidden.meta["val"].shape))
    axes = list(range(len(found)))
    if sizes is None or tuple(found[:2]) == sizes:
        return axes
    first = [found.index(size) for size in sizes if size in found]
    if len(set(first)) != len(sizes):
        raise refused(
            f"the hidden state {hidden} has the sizes {found}, without one of {sizes[0]} rows and "
            f"one of {sizes[1]} tokens",
            "rows and tokens are told apart by axes of their own; this model is not supported",
        )
    return [*first, *(axis for axis in axes if axis not in first)]


def _permuted(order: list[int]) -> tuple[_Change, _Change] | None:
    """A permutation of axes and its inverse, both without gaps: regions are compiled for such
    operands, and code that reads a hidden state may take it as another view.
    """
    axes = sorted(order)
    return None if axes == order else (_to(order), _to([order.index(axis) for axis in axes]))


def _to(order: Sequence[int]) -> _Change:
    def permute(call: Caller, node: Node) -> Node:
        return call(
            torch.ops.aten.contiguous.default, call(torch.ops.aten.permute.default, node, [*order])
        )

    return permute
