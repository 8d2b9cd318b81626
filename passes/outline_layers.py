"""Flat captured graph -> prologue, one call per layer, epilogue.

Every node of the flat graph carries meta["layer"]: the layer it was traced in, or None. Each group
becomes a body whose tensors are all operands: hidden state, side values from the prologue (masks,
rotary tables, positions), the KV slot, the weights. Layers may hand on nothing but the hidden
state; anything else (a layer reading another layer's keys) would make skipping or repeating it
unsound and is refused here.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Pass, PassError, PassResult, role

_ROLE_ORDER = {"hidden": 0, "input": 0, "side": 1, "kv": 2, "weight": 3}


def is_size(node: Node) -> bool:
    """Whether its value is a size, not a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


class Body:
    """Collects nodes, then builds their graph with every outside tensor as an operand; `operands`
    are these, in order.
    """

    def __init__(
        self,
        name: str,
        nodes: list[Node],
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
            place = node.meta["part"] if roles[node] == "kv" else first_use[node]
            return _ROLE_ORDER[roles[node]], place

        self.operands = sorted(seen, key=order)
        self.roles = roles

    def build(self, root: GraphModule, outputs: list[Node], single: bool) -> GraphModule:
        graph = Graph()
        env: dict[Node, Node] = {}
        counts: dict[str, int] = {}
        for operand in self.operands:
            operand_role = self.roles[operand]
            index = counts[operand_role] = counts.get(operand_role, -1) + 1
            new = graph.placeholder(f"{operand_role}_{index}")
            new.meta = {"val": operand.meta.get("val"), "role": operand_role}
            if operand_role == "kv":
                new.meta["part"] = operand.meta["part"]
            env[operand] = new
        sizes: dict[str, tuple[Node, int, torch.SymInt]] = {}
        for operand in self.operands:  # the first operand that has a symbolic size provides it
            value = operand.meta.get("val")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        sizes.setdefault(str(size.node.expr), (env[operand], dim, size))
        made: dict[str, Node] = {}

        def size_of(node: Node) -> Node:
            key = (
                str(node.meta["val"].node.expr)
                if isinstance(node.meta["val"], torch.SymInt)
                else ""
            )
            if key in made:
                return made[key]
            if key in sizes:
                owner, dim, size = sizes[key]
                new = graph.call_function(torch.ops.aten.sym_size.int, (owner, dim))
                new.meta = {"val": size}
            elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
                new = graph.node_copy(node, size_of)  # arithmetic on sizes
            else:
                raise PassError(
                    "outline-layers",
                    f"{self.name} needs the size {key} which no operand has",
                    "report this model",
                )
            return made.setdefault(key, new)

        def lookup(node: Node) -> Node:
            if node in env:
                return env[node]
            return size_of(node)

        for node in self.nodes:
            if node not in env:
                env[node] = graph.node_copy(node, lookup)
        result = env[outputs[0]] if single else tuple(env[o] for o in outputs)
        graph.output(result)
        return GraphModule(root, graph, class_name=self.name)


# body, kind, layer, values it hands on, whether that is one value rather than a tuple
_Region = tuple[Body, str, int | None, list[Node], bool]


def _split(gm: GraphModule) -> tuple[list[Node], list[list[Node]], list[Node]]:
    """Nodes of the prologue, of each layer and of the epilogue, in execution order."""
    layers: dict[int, list[Node]] = {}
    before: list[Node] = []
    after: list[Node] = []
    depends: dict[Node, bool] = {}
    for node in gm.graph.nodes:
        layer = node.meta.get("layer")
        depends[node] = layer is not None or any(depends[i] for i in node.all_input_nodes)
        if node.op in ("placeholder", "get_attr", "output") or (is_size(node) and layer is None):
            continue
        if layer is not None:
            layers.setdefault(layer, []).append(node)
        else:
            (after if depends[node] else before).append(node)
    if sorted(layers) != list(range(len(layers))):
        missing = sorted(set(range(max(layers) + 1)) - set(layers))
        raise PassError(
            "outline-layers",
            f"layers {missing} left no operation in the graph",
            "the stack is not a plain loop",
        )
    late = _only_for_the_head(before, after)
    before, after = [n for n in before if n not in late], [n for n in gm.graph.nodes if n in late]
    return before, [layers[i] for i in range(len(layers))], after


def _only_for_the_head(before: list[Node], after: list[Node]) -> set[Node]:
    """`after`, and what only it needs made of weights alone: the head then takes nothing but hidden
    state and weights.
    """
    constant: set[Node] = set()
    for node in before:
        if all(i.op == "get_attr" or i in constant for i in node.all_input_nodes):
            constant.add(node)
    late = set(after)
    for node in reversed(before):
        if node in constant and node.users and late.issuperset(node.users):
            late.add(node)
    return late


def _first_hidden(layers: list[list[Node]], output: Node) -> Node:
    """The prologue value that plays the hidden state of layer 0: shaped like the layer's output."""

    def outside(nodes: Iterable[Node]) -> dict[Node, None]:
        inside = set(nodes)
        return dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)

    wanted = output.meta["val"]
    shared = {n for nodes in layers[1:] for n in outside(nodes)}
    fits = [
        n
        for n in outside(layers[0])
        if isinstance(n.meta.get("val"), torch.Tensor)
        and n.op == "call_function"
        and n.meta["val"].shape == wanted.shape
        and n.meta["val"].dtype == wanted.dtype
    ]
    if not fits:
        raise PassError(
            "outline-layers",
            "layer 0 takes no value shaped like its output",
            "the stack is not a residual stream",
        )
    return next((n for n in fits if n not in shared), fits[0])


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
        before, layers, after = _split(gm)
        outputs = [self._layer_output(i, nodes, len(layers)) for i, nodes in enumerate(layers)]
        hidden = [_first_hidden(layers, outputs[0]), *outputs]
        owner = {n: i for i, nodes in enumerate(layers) for n in nodes}

        def layer_role(i: int) -> Callable[[Node], str]:
            def of(node: Node) -> str:
                if node is hidden[i]:
                    return "hidden"
                if role(node) == "kv":
                    if node.meta["slot"] != i:
                        raise PassError(
                            "outline-layers",
                            f"layer {i} reads the keys and values of layer {node.meta['slot']}",
                            "editing such a model is unsound; it is not supported",
                        )
                    return "kv"
                if node in owner:
                    raise PassError(
                        "outline-layers",
                        f"layer {i} takes a value of layer {owner[node]} beside the hidden state",
                        "editing such a model is unsound; it is not supported",
                    )
                if node in set(after):
                    raise PassError(
                        "outline-layers",
                        f"layer {i} takes a value computed between layers",
                        "not supported",
                    )
                return "weight" if node.op == "get_attr" else "side"

            return of

        def end_role(node: Node) -> str:
            if node is hidden[-1]:
                return "hidden"
            if node in owner:
                raise PassError(
                    "outline-layers",
                    f"the head reads layer {owner[node]} directly",
                    "not supported",
                )
            if node.op == "get_attr":
                return "weight"
            return "input" if role(node) == "input" else "side"

        bodies = [Body(f"layer_{i}", nodes, layer_role(i)) for i, nodes in enumerate(layers)]
        head = Body("epilogue", after, end_role)
        result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        sides = dict.fromkeys(
            [hidden[0], *(o for b in (*bodies, head) for o in b.operands if b.roles[o] == "side")]
        )
        inputs = {n for n in sides if n.op == "placeholder"}
        made = [n for n in sides if n not in inputs]
        given = [n for n in gm.graph.nodes if n.op == "placeholder" and role(n) == "input"]
        start = Body(
            "prologue", before, lambda n: "weight" if n.op == "get_attr" else "input", always=given
        )
        regions: list[_Region] = [(start, "prologue", None, made, False)]
        regions += [(b, "layer", i, [outputs[i]], True) for i, b in enumerate(bodies)]
        regions.append((head, "epilogue", None, [result], True))
        return PassResult(
            self._assemble(gm, regions),
            True,
            {"layers": len(layers), "side values": len(sides) - 1},
        )

    def _layer_output(self, index: int, nodes: list[Node], depth: int) -> Node:
        inside = set(nodes)
        used = [n for n in nodes if not is_size(n) and any(u not in inside for u in n.users)]
        if len(used) != 1:
            names = ", ".join(str(n) for n in used) or "nothing"
            raise PassError(
                "outline-layers",
                f"layer {index} of {depth} hands on {len(used)} values ({names}) instead of one "
                "hidden state",
                "layers that share state cannot be skipped or repeated; this model is not "
                "supported",
            )
        return used[0]

    def _assemble(self, gm: GraphModule, regions: list[_Region]) -> GraphModule:
        graph = Graph()
        env: dict[Node, Node] = {
            n: graph.node_copy(n) for n in gm.graph.nodes if n.op == "placeholder"
        }
        root: dict[str, Any] = {}

        def operand(node: Node) -> Node:
            if node not in env:
                assert node.op == "get_attr"
                env[node] = graph.node_copy(node)
                root[str(node.target)] = _attribute(gm, str(node.target))
            return env[node]

        for region, kind, layer, outputs, single in regions:
            root[region.name] = region.build(gm, outputs, single)
            call = graph.call_module(region.name, tuple(operand(o) for o in region.operands))
            values = tuple(o.meta.get("val") for o in outputs)
            call.meta = {"kind": kind, "layer": layer, "val": values[0] if single else values}
            if kind == "layer":
                call.meta["step"] = layer  # as captured, step i runs layer i in slot i
            if single:
                env[outputs[0]] = call
            else:
                for i, out in enumerate(outputs):
                    env[out] = graph.call_function(operator.getitem, (call, i))
                    env[out].meta = {"val": out.meta.get("val")}
        graph.output(env[regions[-1][3][0]])
        return GraphModule(root, graph)


def _attribute(gm: GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value
