"""Invariants that hold between passes; a broken one is a bug in a pass, never in the user's
model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .base import body, in_slot, kind, layer_calls, role, storage, writes, writes_slot

_REGION_ROLES = ("input", "hidden", "side", "kv", "state", "blocks", "weight")


class VerifyError(Exception):
    """A graph breaks an invariant: which one, and at which node."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VerifyError(message)


def verify(gm: GraphModule) -> None:
    """Raise VerifyError unless `gm` is a well-formed flat, layer or step graph."""
    output = _verify_form(gm)
    _require(isinstance(output.args[0], Node), "the output must be the logits alone")
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _require(role(node) in ("input", "kv", "state"), f"placeholder {node} has no role")
            _require("val" in node.meta, f"placeholder {node} has no example value")
            if in_slot(node):
                _require({"slot", "part"} <= node.meta.keys(), f"placeholder {node} names no slot")
        elif node.op == "call_module":
            _verify_call(gm, node)
        elif node.op == "call_method":
            _require(False, f"{node} is a method call; passes expect operators")
    _verify_slots(gm)


def verify_region(gm: GraphModule, operands: Sequence[Tensor] | None = None) -> None:
    """Raise VerifyError unless `gm` is well-formed code of a region: the graph of a body, or what
    `torch.export` made of one.

    It consists of operators alone, holds no tensors, returns tensors, and of its operands it writes
    to its slot only, where their roles are known. Calls pass operands by position: given
    `operands`, it must take such ones, of these dtypes and sizes and in this order.
    """
    output = _verify_form(gm)
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else output.args
    _require(len(results) > 0, "a region must return something")
    for node in results:
        is_tensor = isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)
        _require(is_tensor, f"the region returns {node}, which is no tensor")
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _require("val" in node.meta, f"operand {node} has no example value")
            _require(role(node) in (None, *_REGION_ROLES), f"operand {node} is a {role(node)}")
        elif node.op == "get_attr":
            held = getattr(gm, str(node.target), None)
            _require(isinstance(held, GraphModule), f"the region holds {node.target} of its own")
        elif node.op != "output":
            _require(node.op == "call_function", f"{node} is a {node.op}; regions call operators")
            _verify_operator(node)
    if operands is not None:
        _verify_operands(gm, operands)


def _verify_operator(node: Node) -> None:
    _require("val" in node.meta or not node.users, f"{node} has no example value")
    memory = storage(node)
    if writes(node) and memory.op == "placeholder":
        _require(
            role(memory) is None or in_slot(memory), f"{node} writes to {memory}, a {role(memory)}"
        )


def _verify_operands(gm: GraphModule, operands: Sequence[Tensor]) -> None:
    nodes = gm.graph.find_nodes(op="placeholder")
    _require(
        len(nodes) == len(operands),
        f"the region takes {len(nodes)} operands where its calls pass {len(operands)}",
    )
    for node, operand in zip(nodes, operands, strict=True):
        took, passed = _layout(node.meta["val"]), _layout(operand)
        _require(took == passed, f"operand {node} is {took} where calls pass {passed}")


def _layout(value: Tensor) -> str:
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def _verify_form(gm: GraphModule) -> Node:
    """The output of a graph that is sound as such."""
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise VerifyError(f"malformed graph: {error}") from error
    outputs = [n for n in gm.graph.nodes if n.op == "output"]
    _require(len(outputs) == 1, f"{len(outputs)} outputs instead of one")
    return outputs[0]


def _verify_call(gm: GraphModule, call: Node) -> None:
    _require(kind(call) in ("prologue", "layer", "epilogue"), f"call {call} is of no kind")
    inner = body(gm, call)
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    _require(
        len(placeholders) == len(call.args) and not call.kwargs,
        f"{call} passes {len(call.args)} of {len(placeholders)} operands",
    )
    _require(
        all(n.op != "get_attr" for n in inner.graph.nodes),
        f"{call.target} holds tensors of its own",
    )
    for operand, argument in zip(placeholders, call.args, strict=True):
        _require(isinstance(argument, Node), f"{call} passes a literal")
        assert isinstance(argument, Node)
        _require(
            (in_slot(operand) or in_slot(argument)) <= (role(operand) == role(argument)),
            f"{call} passes {argument} as {role(operand)}",
        )
        want, got = operand.meta.get("val"), argument.meta.get("val")
        if isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor):
            same = want.dtype == got.dtype and want.dim() == got.dim()
            _require(
                same,
                f"{call} passes {argument} ({got.dtype}, {got.dim()}-d) where {want.dtype}, "
                f"{want.dim()}-d is expected",
            )


def _verify_slots(gm: GraphModule) -> None:
    """No slot exists twice, and every call that has a step (assign-kv-slots gives it) uses the slot
    of that step, or only reads that of an earlier one.
    """
    slots = [(n.meta["slot"], n.meta["part"]) for n in gm.graph.nodes if in_slot(n)]
    _require(len(set(slots)) == len(slots), f"KV slots are repeated: {slots}")
    calls = [c for c in layer_calls(gm) if "step" in c.meta]
    steps = [c.meta["step"] for c in calls]
    _require(steps == list(range(len(calls))), f"steps {steps} are out of order")
    for call in calls:
        for argument in call.all_input_nodes:
            if in_slot(argument):
                step, slot = call.meta["step"], argument.meta["slot"]
                only_reads = slot < step and not writes_slot(body(gm, call))
                _require(slot == step or only_reads, f"step {step} uses the slot {argument}")
