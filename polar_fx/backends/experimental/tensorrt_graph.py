"""A region's graph taken apart for TensorRT: engines of floating arithmetic around linear layers,
and the rest, which stays in torch. Needs no TensorRT.

TensorRT, up to the version that torch_tensorrt 2.13 is built for, cannot write into memory it is
given: handed the whole graph, torch_tensorrt would turn each KV write into a copy of the slot and
copy it back. So what touches a KV slot stays in torch, and so does everything as long as a slot:
attention.

Shape legend: B batch, T tokens, L KV length.
"""

from collections import defaultdict
from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...passes.base import is_size, storage, writes
from ...passes.outline_layers import Body

# What engines compute, by ATen schema: each has a converter in torch_tensorrt 2.11 to 2.13, or is
# decomposed into some.
ENGINE_OPS = frozenset(
    f"aten::{name}"
    for name in (
        "abs",
        "add",
        "addmm",
        "bmm",
        "cat",
        "chunk",
        "clamp",
        "clone",
        "contiguous",
        "div",
        "erf",
        "exp",
        "expand",
        "flatten",
        "gelu",
        "layer_norm",
        "linear",
        "matmul",
        "mean",
        "mm",
        "mul",
        "neg",
        "permute",
        "pow",
        "relu",
        "reshape",
        "rsqrt",
        "select",
        "sigmoid",
        "silu",
        "slice",
        "split",
        "split_with_sizes",
        "sqrt",
        "square",
        "squeeze",
        "stack",
        "sub",
        "sum",
        "t",
        "tanh",
        "to",
        "transpose",
        "type_as",
        "unbind",
        "unsqueeze",
        "view",
    )
)
# An engine without one of these would not be worth its launch.
_ANCHORS = {"aten::linear", "aten::addmm"}
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def split_for_engines(graph_module: GraphModule, keep: Collection[str] = ()) -> GraphModule:
    """The graph with its engine parts as submodules `engine_0`, `engine_1` ..., each a function of
    tensors to a tuple.

    Computes the same, writes the same memory. `keep` names operators (`aten::gelu`) that stay in
    torch as well.
    """
    levels = _assign(graph_module.graph, keep)
    graph, env, root = Graph(), {}, {}

    def copy(node: Node) -> Node:
        if node not in env:  # an operand, or a size when it is first asked for
            env[node] = graph.node_copy(node, copy)
        return env[node]

    for operand in graph_module.graph.find_nodes(op="placeholder"):
        copy(operand)
    for level in sorted(set(levels.values())):
        nodes = [n for n in levels if levels[n] == level]
        if level % 2 == 0:
            for node in nodes:
                copy(node)
            continue
        results = [n for n in nodes if set(map(levels.get, n.users)) - {level}]
        body = Body(f"engine_{len(root)}", nodes, operand_role=lambda _: "input")
        root[body.name] = body.build(graph_module, results, single=False)
        call = graph.call_module(body.name, tuple(map(copy, body.operands)))
        for i, node in enumerate(results):
            env[node] = graph.call_function(getitem, (call, i))
            env[node].meta = dict(node.meta)
    graph.node_copy(graph_module.graph.output_node(), copy)
    return GraphModule(root, graph)


def engines(graph_module: GraphModule) -> dict[str, GraphModule]:
    """The engine parts of a graph that was split, in the order they run."""
    called = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    return {name: graph_module.get_submodule(name) for name in called}  # type: ignore[misc]


def _assign(graph: Graph, keep: Collection[str]) -> dict[Node, int]:
    """Each operator's place in line: even numbers run in torch, odd ones are an engine each."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]
    written = {storage(n) for n in nodes if writes(n)}
    stays = _as_long_as_kv(nodes)
    engine: set[Node] = set()
    for node in nodes:
        touches = any(n in stays or storage(n) in written for n in node.all_input_nodes)
        if (
            not touches
            and node not in stays
            and (_fits(node, keep) or (node.target is getitem and node.args[0] in engine))
        ):
            engine.add(node)
    while True:
        levels = _levels(nodes, engine, written=written)
        groups: defaultdict[int, set[Node]] = defaultdict(set)
        for node in engine:
            groups[levels[node]].add(node)
        unfit = [group for group in groups.values() if not _is_worth_it(group)]
        if not unfit:
            return levels
        engine.difference_update(*unfit)


def _fits(node: Node, keep: Collection[str]) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or writes(node):
        return False
    name = node.target._schema.name
    tensors = [v for n in (node, *node.all_input_nodes) if not is_size(n) for v in _values(n)]
    return name in ENGINE_OPS and name not in keep and all(v.dtype in _DTYPES for v in tensors)


def _is_worth_it(nodes: set[Node]) -> bool:
    """Whether there is a linear layer, and no operand with a size such as B*T, for which TensorRT
    would need a range.
    """
    sizes = [
        s
        for n in nodes
        for i in n.all_input_nodes
        if i not in nodes
        for v in _values(i)
        for s in v.shape
    ]
    plain = all(s.node.expr.is_Symbol for s in sizes if isinstance(s, torch.SymInt))
    operators: list[Any] = [n.target for n in nodes if n.target is not getitem]
    return plain and any(operator._schema.name in _ANCHORS for operator in operators)


def _as_long_as_kv(nodes: list[Node]) -> set[Node]:
    """Values made of KV slots that have an axis of L: keys and values, scores, probabilities.

    Where another size happens to equal L, attention written out in operators ends later than it
    need.
    """
    lengths: set[str] = set()
    found: set[Node] = set()
    for node in nodes:
        if (
            writes(node)
            and node.target is torch.ops.aten.index_put_.default
            and storage(node).op == "placeholder"
        ):
            places: Any = node.args[1]
            lengths.add(str(storage(node).meta["val"].shape[len(places) - 1]))
            found |= {node, storage(node)}
        elif node.target is not _SDPA and not found.isdisjoint(node.all_input_nodes):
            found |= {node for v in _values(node) for s in v.shape if str(s) in lengths}
    return found


def _levels(nodes: list[Node], engine: set[Node], *, written: set[Node]) -> dict[Node, int]:
    levels: dict[Node, int] = {}
    seen: dict[Node, int] = {}  # the last level that touched memory which is written at some time
    for node in nodes:
        level = int(node in engine)
        for source in node.all_input_nodes:
            for tensor in (
                source.all_input_nodes if is_size(source) and node not in engine else [source]
            ):
                if tensor in levels:
                    level = max(level, levels[tensor] + ((tensor in engine) != (node in engine)))
        for memory in {storage(n) for n in node.all_input_nodes} & written:
            level = max(level, seen.get(memory, 0))
            seen[memory] = level
        levels[node] = level
    return levels


def _values(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [
        v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)
    ]
