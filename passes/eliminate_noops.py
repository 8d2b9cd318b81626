"""Remove nodes that return their input unchanged: tracing leaves many, and they hide equal
layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from .base import Pass, PassResult, copy_graph_module
from .torch_types import schema

_END = 2**63 - 1
_ASSERTS = (
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
)


def _returns_input(node: Node) -> bool:
    called = schema(node)
    if called is None or not node.args or not isinstance(node.args[0], Node):
        return False
    name = called.name
    source, result = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if name == "aten::to":
        copies = bool(node.kwargs.get("copy", False)) or True in node.args[2:]
        same = (source.dtype, source.device, source.layout) == (
            result.dtype,
            result.device,
            result.layout,
        )
        return same and not copies
    if name == "aten::slice":
        start, end, step = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
        return start in (None, 0) and end in (None, _END) and bool(step == 1)
    if name == "aten::dropout":
        return node.args[2] is False
    return name in ("aten::alias", "aten::detach", "aten::lift_fresh_copy_")


@dataclass(frozen=True)
class EliminateNoops(Pass):
    """Drop conversions to the dtype a tensor already has, full slices, dropout at inference and
    shape asserts.
    """

    name: ClassVar[str] = "eliminate-noops"

    def run(self, gm: GraphModule) -> PassResult:
        new, graph = copy_graph_module(gm)
        removed = 0
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            called = schema(node)
            if called is not None and called.name in _ASSERTS:
                graph.erase_node(node)
            elif _returns_input(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            else:
                continue
            removed += 1
        if not removed:
            return PassResult(gm, False)
        new.recompile()
        return PassResult(new, True, {"no-ops removed": removed})
