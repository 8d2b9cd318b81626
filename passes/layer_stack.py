"""A flat graph as a prologue, the layers of a stack and an epilogue, and the hidden states between
them.

Every node of the flat graph carries meta["layer"]: the layer it was traced in, or None.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.fx import GraphModule, Node

from .base import PassError, in_slot, is_size, role, storage, writes


def refused(problem: str, remedy: str) -> PassError:
    """The error of the pass that outlines layers."""
    return PassError("outline-layers", problem, remedy)


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
        raise refused(
            f"layers {missing} left no operation in the graph",
            "the stack is not a plain loop",
        )
    late = _only_for_the_head(before, after)
    before = [n for n in before if n not in late]
    after = [n for n in gm.graph.nodes if n in late]
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
        and n.meta["val"].is_floating_point()
    ]
    if not fits:
        raise refused(
            "layer 0 takes no value shaped like its output",
            "the stack is not a residual stream",
        )
    return next((n for n in fits if n not in shared), fits[0])


def _readers(gm: GraphModule, layers: Sequence[Iterable[Node]]) -> dict[int, int]:
    """The layers that only read keys and values, all parts of one slot, and the earlier layer that
    writes these.
    """
    parts: dict[int, set[Node]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if in_slot(node):
            parts.setdefault(node.meta["slot"], set()).add(node)
    written: list[set[Node]] = []
    for nodes in layers:
        written.append({storage(n) for n in nodes if writes(n)})
    found: dict[int, int] = {}
    for layer, nodes in enumerate(layers):
        taken = {source for node in nodes for source in node.all_input_nodes if in_slot(source)}
        slots = {node.meta["slot"] for node in taken}
        if len(slots) != 1 or any(map(in_slot, written[layer])):
            continue
        (owner,) = slots
        whole = taken == parts[owner] and {role(node) for node in taken} == {"kv"}
        if owner < layer and whole and taken <= written[owner]:
            found[layer] = owner
    return found


class Stack:
    """The flat graph as a prologue, layers and an epilogue, and what each of these takes.

    `hidden[i]` is the hidden state that layer i takes, and the last one the epilogue's.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.before, self.layers, self.after = _split(gm)
        depth = len(self.layers)
        self.outputs = [_layer_output(i, nodes, depth=depth) for i, nodes in enumerate(self.layers)]
        self.hidden = [_first_hidden(self.layers, self.outputs[0]), *self.outputs]
        self._owner = {n: i for i, nodes in enumerate(self.layers) for n in nodes}
        self._late = set(self.after)
        self._readers = _readers(gm, self.layers)

    def layer_role(self, index: int, node: Node) -> str:
        """What `node` is to a layer; raises PassError if layers share more than the hidden state
        and the slot of one.
        """
        unsound = "editing such a model is unsound; it is not supported"
        if node is self.hidden[index]:
            return "hidden"
        if in_slot(node):
            slot = node.meta["slot"]
            if slot != self._readers.get(index, index):
                what = "keys and values" if role(node) == "kv" else "state"
                raise refused(f"layer {index} reads the {what} of layer {slot}", unsound)
            return str(role(node))
        if node in self._owner:
            other = self._owner[node]
            raise refused(
                f"layer {index} takes a value of layer {other} beside the hidden state", unsound
            )
        if node in self._late:
            raise refused(f"layer {index} takes a value computed between layers", "not supported")
        return "weight" if node.op == "get_attr" else "side"

    def head_role(self, node: Node) -> str:
        """What `node` is to the epilogue; raises PassError if it reads inside a layer."""
        if node is self.hidden[-1]:
            return "hidden"
        if node in self._owner:
            raise refused(f"the head reads layer {self._owner[node]} directly", "not supported")
        if node.op == "get_attr":
            return "weight"
        return "input" if role(node) == "input" else "side"


def _layer_output(index: int, nodes: list[Node], *, depth: int) -> Node:
    """The one value that later nodes take of a layer; raises PassError if it is not one."""
    inside = set(nodes)
    used = [n for n in nodes if not is_size(n) and not inside.issuperset(n.users)]
    if len(used) != 1:
        names = ", ".join(map(str, used)) or "nothing"
        raise refused(
            f"layer {index} of {depth} hands on {len(used)} values ({names}) instead of one "
            "hidden state",
            "layers that share state cannot be skipped or repeated; this model is not supported",
        )
    return used[0]
