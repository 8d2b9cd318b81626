"""Invariants that hold between passes; a broken one is a bug in a pass, never in the user's
model.
"""

import torch
from torch.fx import GraphModule, Node

from .base import body, kind, layer_calls, role


class VerifyError(Exception):
    """A graph breaks an invariant: which one, and at which node."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VerifyError(message)


def verify(gm: GraphModule) -> None:
    """Raise VerifyError unless `gm` is a well-formed flat, layer or step graph."""
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise VerifyError(f"malformed graph: {error}") from error
    outputs = [n for n in gm.graph.nodes if n.op == "output"]
    _require(len(outputs) == 1, f"{len(outputs)} outputs instead of one")
    _require(isinstance(outputs[0].args[0], Node), "the output must be the logits alone")
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _require(role(node) in ("input", "kv"), f"placeholder {node} has no role")
            _require("val" in node.meta, f"placeholder {node} has no example value")
            if role(node) == "kv":
                _require(
                    {"slot", "part"} <= node.meta.keys(), f"KV placeholder {node} names no slot"
                )
        elif node.op == "call_module":
            _verify_call(gm, node)
        elif node.op == "call_method":
            _require(False, f"{node} is a method call; passes expect operators")
    _verify_slots(gm)


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
            (role(operand) == "kv") == (role(argument) == "kv"),
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
    of that step.
    """
    slots = [(n.meta["slot"], n.meta["part"]) for n in gm.graph.nodes if role(n) == "kv"]
    _require(len(set(slots)) == len(slots), f"KV slots are repeated: {slots}")
    calls = [c for c in layer_calls(gm) if "step" in c.meta]
    _require(
        [c.meta["step"] for c in calls] in ([], list(range(len(calls)))),
        f"steps {[c.meta['step'] for c in calls]} are out of order",
    )
    for call in calls:
        for argument in call.all_input_nodes:
            if role(argument) == "kv":
                _require(
                    argument.meta["slot"] == call.meta["step"],
                    f"step {call.meta['step']} uses the slot {argument}",
                )
