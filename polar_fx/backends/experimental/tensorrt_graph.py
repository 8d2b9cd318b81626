"""A region's graph for TensorRT. Needs no TensorRT.

`split_for_engines` takes it apart: engines of floating arithmetic around linear layers, and the
rest, which stays in torch. torch_tensorrt up to 2.13 cannot write into memory it is given: handed
the whole graph, it would turn each KV write into a copy of the slot and copy it back. So what
touches a KV slot stays in torch, and so does everything as long as a slot: attention.

`whole_engine` leaves the decoding of one row in one piece, for torch_tensorrt from 2.14 on, whose
engines write one token's keys and values in place.

Shape legend: B batch, T tokens, H heads, L KV length, E size of a head.
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
# What one engine for a whole decoded token computes as well, with torch_tensorrt from 2.14 on.
WHOLE_OPS = ENGINE_OPS | {
    f"aten::{name}"
    for name in ("index_copy", "masked_fill", "scaled_dot_product_attention", "softmax", "where")
}
# An engine without one of these would not be worth its launch.
_ANCHORS = {"aten::linear", "aten::addmm"}
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
# positions and masks of a whole decoded token
_OTHER_DTYPES = {torch.int64, torch.bool}
aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


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


def whole_engine(graph_module: GraphModule, keep: Collection[str] = ()) -> GraphModule | None:
    """The graph of a layer that decodes one row as one submodule `engine_0`, a function of tensors
    to a tuple; None if it is anything else, or holds an operator that an engine does not compute.

    Computes the same. Each slot [1, H, L, E] is written by an `index_copy`, whose result stands for
    the slot from then on: run as it is, the slot itself is left as it was, and whatever runs it has
    to write in place. torch_tensorrt does.
    """
    inner = _written_by_copies(graph_module.graph)
    if inner is None or not all(_fits_whole(n, keep) for n in _calls(inner)):
        return None
    if not any(_schema(n) in _ANCHORS for n in _calls(inner)):
        return None
    graph = Graph()
    operands: list[Node] = []
    taken = {n.name for n in inner.find_nodes(op="placeholder")}
    for operand in graph_module.graph.find_nodes(op="placeholder"):
        copied = graph.node_copy(operand)
        if operand.name in taken:
            operands.append(copied)
    call = graph.call_module("engine_0", tuple(operands))
    results: list[Node] = []
    outputs: Any = graph_module.graph.output_node().args[0]
    for i, node in enumerate(outputs):
        results.append(graph.call_function(getitem, (call, i)))
        results[-1].meta = dict(node.meta)
    graph.output(tuple(results))
    return GraphModule({"engine_0": GraphModule({}, inner)}, graph)


def written_slots(graph: Graph) -> list[str]:
    """The operands that an engine writes in place, by name."""
    copies = graph.find_nodes(op="call_function", target=aten.index_copy.default)
    return [str(node.args[0]) for node in copies]


def _written_by_copies(before: Graph) -> Graph | None:
    """The graph with its slots written by `index_copy`, without operands that nothing takes; None
    if it writes otherwise, or has sizes that vary.
    """
    graph, env = Graph(), {}
    written: set[Node] = set()
    slot: Any
    places: Any
    update: Any
    for node in before.nodes:
        if any(isinstance(size, torch.SymInt) for v in _values(node) for size in v.shape):
            return None
        if writes(node):
            if not _writes_token(node) or storage(node) in written:
                return None
            slot, places, update = node.args[:3]
            position: Node = places[2]
            if any(storage(i) is slot for n in env for i in n.all_input_nodes):
                return None  # what was read before the write is another value than after it
            written.add(slot)
            where = graph.call_function(aten.reshape.default, (env[position], [1]))
            heads = graph.call_function(aten.transpose.int, (env[update], 1, 2))
            copied = graph.call_function(aten.index_copy.default, (env[slot], 2, where, heads))
            where.meta["val"] = position.meta["val"].reshape(1)
            heads.meta["val"] = update.meta["val"].transpose(1, 2)
            copied.meta["val"] = slot.meta["val"]
            env[node] = env[slot] = copied
        elif node.op in ("placeholder", "call_function", "output"):
            env[node] = graph.node_copy(node, lambda n: env[n])
        else:
            return None
    graph.eliminate_dead_code()
    for operand in graph.find_nodes(op="placeholder"):
        if not operand.users:
            graph.erase_node(operand)
    # a write that nothing reads is gone
    return graph if written and len(written_slots(graph)) == len(written) else None


def _writes_token(node: Node) -> bool:
    """Whether it writes the keys or values [1, 1, H, E] of one token into a slot [1, H, L, E]."""
    if node.target is not aten.index_put_.default or len(node.args) != 3:
        return False
    slot: Any
    update: Any
    places: Any
    slot, places, update = node.args
    if slot.op != "placeholder" or len(places) != 3 or places[1] is not None:
        return False
    if any(place is None for place in (places[0], places[2])):
        return False
    (one, heads, _, size), shape = slot.meta["val"].shape, tuple(update.meta["val"].shape)
    return one == 1 and shape == (1, 1, heads, size) and places[2].meta["val"].numel() == 1


def _fits_whole(node: Node, keep: Collection[str]) -> bool:
    name = _schema(node)
    tensors = [v for n in (node, *node.all_input_nodes) for v in _values(n)]
    known = node.target is getitem or (name in WHOLE_OPS and name not in keep)
    return known and not writes(node) and all(v.dtype in _DTYPES | _OTHER_DTYPES for v in tensors)


def _calls(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _schema(node: Node) -> str:
    """The name of an operator, empty for what is none."""
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


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
            and node.target is aten.index_put_.default
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
