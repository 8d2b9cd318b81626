"""Linear layers over the same input become one call of an operator that takes lists of weights.

Starting a parallel loop takes a share of one row's token, and layers such as those that make
queries, keys and values read the same rows. What a layer gave becomes a part of what the call
gives.
"""

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Caller, PassResult, copy_graph_module, writes
from .torch_types import schema

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """What a linear layer is made of: x [..., K], the weight [N, ...], and what else the operator
    takes a list of, None for what this layer has not. Layers of the same `kind` may share a call.
    """

    x: Node
    weight: Node
    others: tuple[Node | None, ...]
    kind: Hashable

    def operands(self) -> tuple[Node | None, ...]:
        return self.weight, *self.others


def join_linears(
    gm: GraphModule, find: Callable[[Node], Linear | None], *, target: Any
) -> PassResult:
    """Rewrite the linears that `find` sees as calls of `target(x, weights, ...)`, those over the
    same x as one, at the first of them.

    Apart stay layers with operands made in between, with one that another has too (a kernel names
    each of its operands once), and those with a write to memory between them.
    """
    if not any(map(find, gm.graph.nodes)):
        return PassResult(gm, False)
    new, graph = copy_graph_module(gm)
    position = {node: i for i, node in enumerate(graph.nodes)}
    # in order: what made the x of one may be rewritten itself
    groups = sorted(_groups(graph, find), key=lambda nodes: position[nodes[0]])
    for nodes in groups:
        _rewrite(graph, nodes, find=find, target=target)
    new.recompile()
    counts: dict[str, int | str] = {
        "linears rewritten": sum(map(len, groups)),
        "calls": len(groups),
    }
    return PassResult(new, True, counts)


def _groups(graph: Graph, find: Callable[[Node], Linear | None]) -> Iterator[list[Node]]:
    """The linears of each call."""
    open_groups: dict[Hashable, list[Node]] = {}
    taken: dict[Hashable, set[Node | None]] = {}
    for node in graph.nodes:
        linear = find(node)
        if linear is None:
            if writes(node):
                yield from open_groups.values()
                open_groups, taken = {}, {}
            continue
        given = {node for node in linear.operands() if node is not None}
        key = (linear.x, linear.kind, tuple(node is None for node in linear.others))
        if given & taken.get(key, set()) or not all(map(is_operand, given)):
            yield [node]
            continue
        open_groups.setdefault(key, []).append(node)
        taken.setdefault(key, set()).update(given)
    yield from open_groups.values()


def _rewrite(
    graph: Graph, nodes: Sequence[Node], *, find: Callable[[Node], Linear | None], target: Any
) -> None:
    """Replace linears by one call, where the first of them is."""
    # found anew: what they are over may have been rewritten since
    linears = [linear for linear in map(find, nodes) if linear is not None]
    with graph.inserting_before(nodes[0]):
        call = Caller(graph, nodes[0])
        lists: list[list[Node]] = []
        for column in zip(*map(Linear.operands, linears), strict=True):
            lists.append([operand for operand in column if operand is not None])
        result = call(target, call.dense(linears[0].x), *lists)
        end, parts = 0, [result] if len(linears) == 1 else list[Node]()
        for node, linear in zip(nodes, linears, strict=True) if len(linears) > 1 else ():
            start, end = end, end + linear.weight.meta["val"].shape[0]
            parts.append(Caller(graph, node)(aten.slice.Tensor, result, -1, start, end))
    for node, part in zip(nodes, parts, strict=True):
        if len(nodes) > 1:
            _allow_gaps(graph, node)
        node.replace_all_uses_with(part)
        _erase(graph, node)


def _allow_gaps(graph: Graph, node: Node) -> None:
    """Prepare what reads a linear, or a view of it, for gaps between the rows: views that may need
    a copy then, and results of the graph.
    """
    for user in list(node.users):
        if user.op == "output":
            with graph.inserting_before(user):
                dense = graph.call_function(aten.contiguous.default, (node,))
            dense.meta = dict(node.meta)
            user.replace_input_with(node, dense)
            continue
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        found = schema(user)
        is_view = found is not None and any(returned.alias_info for returned in found.returns)
        is_view = is_view or cast(object, user.target) is operator.getitem
        if is_view and user.args[0] is node:
            _allow_gaps(graph, user)


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node that nobody reads any more, and then what it alone has read."""
    read = node.all_input_nodes
    graph.erase_node(node)
    for other in read:
        # torch.export notes the dtype of what is cast; that alone is no reason to compute it
        if all(user.target is aten._assert_tensor_metadata.default for user in other.users):
            for user in list(other.users):
                graph.erase_node(user)
        if not other.users and other.op == "call_function":
            _erase(graph, other)


def is_operand(node: Node) -> bool:
    """Whether the graph is given it."""
    return node.op in ("placeholder", "get_attr")
