"""Flat captured graph -> prologue, one call per layer, epilogue.

Every node of the flat graph carries meta["layer"]: the layer it was traced in, or None. Each group
becomes a body whose tensors are all operands: hidden state, side values from the prologue (masks,
rotary tables, positions), the KV slot, the weights. Layers may hand on nothing but the hidden
state, and a layer without a slot of its own may read that of one earlier layer; anything else would
make skipping or repeating it unsound and is refused here.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassResult, in_slot, is_size, role, writes
from .hidden_states import in_one_dtype, rows_and_tokens_first
from .layer_stack import Stack, refused
from .torch_types import is_operator, size_expression

_ROLE_ORDER = {"hidden": 0, "input": 0, "side": 1, "kv": 2, "state": 2, "weight": 3}


class Body:
    """Collects nodes, then builds their graph with every outside tensor as an operand; `operands`
    are these, in order.
    """

    def __init__(
        self,
        name: str,
        nodes: list[Node],
        *,
        operand_role: Callable[[Node], str],
        always: Iterable[Node] = (),
    ) -> None:
        self.name, self.nodes = name, nodes
        inside = set(nodes)
        seen: dict[Node, None] = dict.fromkeys(always)
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in inside and not is_size(source):
                    seen.setdefault(source)
        roles = {n: operand_role(n) for n in seen}
        first_use = {n: i for i, n in enumerate(seen)}

        def order(node: Node) -> tuple[int, int]:
            place = node.meta["part"] if roles[node] in ("kv", "state") else first_use[node]
            return _ROLE_ORDER[roles[node]], place

        self.operands = sorted(seen, key=order)
        self.roles = roles

    def build(self, root: GraphModule, outputs: list[Node], *, single: bool) -> GraphModule:
        """The graph that takes the operands and gives `outputs`: the one value if `single`, else a
        tuple; raises PassError if it needs a size that no operand has.
        """
        graph = Graph()
        env = self._placeholders(graph)
        sizes = _Sizes(self.name, graph, operands=env)
        for node in self.nodes:
            if node not in env:
                env[node] = graph.node_copy(node, lambda n: env[n] if n in env else sizes.of(n))
        graph.output(env[outputs[0]] if single else tuple(env[o] for o in outputs))
        return GraphModule(root, graph, class_name=self.name)

    def _placeholders(self, graph: Graph) -> dict[Node, Node]:
        """One for each operand, numbered within its role."""
        made: dict[Node, Node] = {}
        counts: dict[str, int] = {}
        for operand in self.operands:
            operand_role = self.roles[operand]
            index = counts[operand_role] = counts.get(operand_role, -1) + 1
            new = graph.placeholder(f"{operand_role}_{index}")
            new.meta = {"val": operand.meta.get("val"), "role": operand_role}
            if in_slot(new):
                new.meta["part"] = operand.meta["part"]
            made[operand] = new
        return made


class _Sizes:
    """Symbolic sizes in the graph of one body: each is read off the first operand that has it."""

    def __init__(self, body: str, graph: Graph, *, operands: Mapping[Node, Node]) -> None:
        self._body, self._graph = body, graph
        self._made: dict[str, Node] = {}
        self._read: dict[str, tuple[Node, int, torch.SymInt]] = {}
        for operand, placeholder in operands.items():
            value = operand.meta.get("val")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(cast(Sequence[int | torch.SymInt], value.shape)):
                    if isinstance(size, torch.SymInt):
                        place = (placeholder, dim, size)
                        self._read.setdefault(str(size_expression(size)), place)

    def of(self, node: Node) -> Node:
        """The node of the body with the size that `node` has in the flat graph."""
        value = node.meta["val"]
        key = str(size_expression(value)) if isinstance(value, torch.SymInt) else ""
        if key in self._made:
            return self._made[key]
        if key in self._read:
            owner, dim, size = self._read[key]
            new = self._graph.call_function(torch.ops.aten.sym_size.int, (owner, dim))
            new.meta = {"val": size}
        elif node.op == "call_function" and not is_operator(node):
            new = self._graph.node_copy(node, self.of)  # arithmetic on sizes
        else:
            raise refused(
                f"{self._body} needs the size {key} which no operand has", "report this model"
            )
        return self._made.setdefault(key, new)


@dataclass(frozen=True)
class _Region:
    """A body and its place in the model."""

    body: Body
    kind: str
    layer: int | None
    outputs: list[Node]  # what it hands on
    single: bool  # as one value rather than a tuple

    def call_into(self, graph: Graph, operands: tuple[Node, ...]) -> dict[Node, Node]:
        """Add its call to a graph; the values it hands on, by the nodes they were in the flat
        graph.
        """
        call = graph.call_module(self.body.name, operands)
        values = tuple(o.meta.get("val") for o in self.outputs)
        call.meta = {
            "kind": self.kind,
            "layer": self.layer,
            "val": values[0] if self.single else values,
        }
        if self.kind == "layer":
            call.meta["step"] = self.layer  # as captured, step i runs layer i in slot i
        if self.single:
            return {self.outputs[0]: call}
        given: dict[Node, Node] = {}
        for i, (out, value) in enumerate(zip(self.outputs, values, strict=True)):
            given[out] = graph.call_function(operator.getitem, (call, i))
            given[out].meta = {"val": value}
        return given


def _in_order_of_use(nodes: list[Node], wanted: Iterable[Node]) -> list[Node]:
    """The nodes as `wanted` values need them, one after the other, then those that none needs.

    The traced order is not the same in every process where a model loops over a set of names, as
    transformers does over types of layers with frequencies of their own. It is kept where no two
    values are made of different weights, so that fingerprints of other models stay, and where a
    node writes into memory.
    """
    inside, done = set(nodes), dict[Node, None]()
    values = [node for node in wanted if node in inside]
    made_of = _weights_of(nodes)
    if len({made_of[n] for n in values[1:] if made_of[n]}) < 2 or any(map(writes, nodes)):
        return nodes
    left = [*reversed(nodes), *reversed(values)]
    while left:
        node = left[-1]
        needed = [n for n in node.all_input_nodes if n in inside and n not in done]
        if needed and node not in done:
            left += reversed(needed)
        else:
            done.setdefault(left.pop())
    return list(done)


def _weights_of(nodes: Iterable[Node]) -> dict[Node, frozenset[str]]:
    """The names of the weights that each node is made of, by way of the others."""
    found: dict[Node, frozenset[str]] = {}
    for node in nodes:
        own = {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
        found[node] = frozenset(own).union(*(found.get(n, ()) for n in node.all_input_nodes))
    return found


@dataclass(frozen=True)
class OutlineLayers(Pass):
    """Group the flat graph by meta["layer"] into bodies `prologue`, `layer_0` ... and
    `epilogue`.
    """

    name: ClassVar[str] = "outline-layers"

    def run(self, gm: GraphModule) -> PassResult:
        if not any(
            n.meta.get("layer") is not None and n.op == "call_function" for n in gm.graph.nodes
        ):
            return PassResult(gm, False)
        gm = rows_and_tokens_first(in_one_dtype(gm))
        stack = Stack(gm)
        layers = [
            Body(f"layer_{i}", nodes, operand_role=partial(stack.layer_role, i))
            for i, nodes in enumerate(stack.layers)
        ]
        head = Body("epilogue", stack.after, operand_role=stack.head_role)
        sides = {stack.hidden[0]: None}
        for body in (*layers, head):
            sides |= dict.fromkeys(o for o in body.operands if body.roles[o] == "side")
        made = [n for n in sides if n.op != "placeholder"]
        start = Body(
            "prologue",
            _in_order_of_use(stack.before, made),
            operand_role=lambda n: "weight" if n.op == "get_attr" else "input",
            always=[n for n in gm.graph.nodes if n.op == "placeholder" and role(n) == "input"],
        )
        result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        regions = [_Region(start, "prologue", layer=None, outputs=made, single=False)]
        for i, (body, output) in enumerate(zip(layers, stack.outputs, strict=True)):
            regions.append(_Region(body, "layer", layer=i, outputs=[output], single=True))
        regions.append(_Region(head, "epilogue", layer=None, outputs=[result], single=True))
        counts = {"layers": len(layers), "side values": len(sides) - 1}
        return PassResult(_assemble(gm, regions), True, counts)


def _assemble(gm: GraphModule, regions: list[_Region]) -> GraphModule:
    """A graph that calls the regions in order and gives what the last one hands on."""
    graph = Graph()
    env: dict[Node, Node] = {n: graph.node_copy(n) for n in gm.graph.nodes if n.op == "placeholder"}
    root: dict[str, Any] = {}

    def operand(node: Node) -> Node:
        if node not in env:
            assert node.op == "get_attr"
            env[node] = graph.node_copy(node)
            root[str(node.target)] = _attribute(gm, str(node.target))
        return env[node]

    for region in regions:
        root[region.body.name] = region.body.build(gm, region.outputs, single=region.single)
        operands = tuple(operand(o) for o in region.body.operands)
        env |= region.call_into(graph, operands)
    graph.output(env[regions[-1].outputs[0]])
    return GraphModule(root, graph)


def _attribute(gm: GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value
