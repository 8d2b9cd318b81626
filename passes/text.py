"""Stable graph text: the same graph prints the same characters in every process and torch version
we support.

Shape legend: B batch, T tokens, L KV length; further symbols are S3, S4 ... in order of appearance.
Values are numbered in order, so traced names do not matter. The text of a layer body is also its
structural identity (see dedupe_layers): operators, wiring, literals, dtypes and shapes are all in
it, names are not.
"""

import difflib
import hashlib
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from .torch_types import is_operator, size_expression

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}
_AXES = ("B", "T", "L")


def _is_dense(value: torch.Tensor) -> bool:
    """Whether the strides are those of a contiguous tensor; asks nothing of symbols, whose values
    may be unknown.
    """
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if str(size) != "1" and str(stride) != str(expected):
            return False
        expected = expected * size
    return True


class _Printer:
    def __init__(self) -> None:
        self.symbols: dict[str, str] = {}

    def size(self, value: Any) -> str:
        """A size or symbolic expression, with symbols renamed in order of appearance, and sums in
        the order of those.
        """
        if not isinstance(value, torch.SymInt):
            return str(value)
        expression = size_expression(value)
        symbols = sorted(expression.free_symbols, key=lambda s: (len(s.name), s.name))
        return str(expression.xreplace({s: type(s)(self.symbol(s.name)) for s in symbols}))

    def symbol(self, name: str) -> str:
        """B, T, L, S3, S4 ... for the first, second ... symbol seen."""
        n = len(self.symbols)
        return self.symbols.setdefault(name, _AXES[n] if n < len(_AXES) else f"S{n}")

    def type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            shape = ", ".join(self.size(s) for s in value.shape)
            dense = (
                ""
                if _is_dense(value)
                else f" strides({', '.join(self.size(s) for s in value.stride())})"
            )
            device = "" if value.device.type in ("cpu", "meta") else f" {value.device.type}"
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{shape}]{dense}{device}"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self.type(v) for v in cast(Sequence[object], value)) + ")"
        if isinstance(value, (int, torch.SymInt)):
            return f"int {self.size(value)}"
        return type(value).__name__

    def argument(self, value: Any, names: dict[Node, str]) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, (tuple, list)):
            inner = cast(Sequence[object], value)
            return "[" + ", ".join(self.argument(v, names) for v in inner) + "]"
        if isinstance(value, slice):
            part = cast("slice[object, object, object]", value)
            return f"{part.start}:{part.stop}:{part.step}"
        return self.size(value) if isinstance(value, torch.SymInt) else str(value)


def _operator_name(node: Node, gm: GraphModule, *, bodies: dict[str, GraphModule]) -> str:
    if node.op == "call_module":
        child = gm.get_submodule(str(node.target))
        assert isinstance(child, GraphModule)
        bodies.setdefault(str(node.target), child)
        return f"@{node.target}"
    target = cast(object, node.target)
    if is_operator(node):
        return str(target)
    module = (
        ""
        if getattr(operator, getattr(target, "__name__", ""), None) is target
        else f"{getattr(target, '__module__', '')}."
    )
    return module + getattr(target, "__name__", str(target))


def _graph_lines(
    gm: GraphModule, title: str, *, bodies: dict[str, GraphModule], names_matter: bool
) -> list[str]:
    printer = _Printer()
    names: dict[Node, str] = {}
    header: list[str] = []
    lines: list[str] = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            label = str(node.target) if names_matter else str(node.meta.get("role", ""))
            names[node] = f"%{label}" if names_matter else f"%{len(names)}"
            header.append(
                f"{names[node]}{'' if names_matter else ' ' + label}: {printer.type(value)}"
            )
        elif node.op == "get_attr":
            names[node] = f"${node.target}"
        elif node.op == "output":
            lines.append(f"  return {printer.argument(node.args[0], names)}")
        else:
            names[node] = f"%{len(names)}"
            arguments = [printer.argument(a, names) for a in node.args]
            arguments += [
                f"{k}={printer.argument(v, names)}" for k, v in sorted(node.kwargs.items())
            ]
            call = f"{_operator_name(node, gm, bodies=bodies)}({', '.join(arguments)})"
            layer = node.meta.get("layer")
            tag = (
                f"  # layer {layer}"
                if names_matter and layer is not None and node.op == "call_module"
                else ""
            )
            lines.append(f"  {names[node]}: {printer.type(value)} = {call}{tag}")
    return [f"{title}({', '.join(header)}) {{", *lines, "}"]


def graph_text(gm: GraphModule) -> str:
    """Readable text of a graph and of every body it calls (each printed once)."""
    bodies: dict[str, GraphModule] = {}
    lines = _graph_lines(gm, "graph", bodies=bodies, names_matter=True)
    for name, child in bodies.items():
        lines += ["", *_graph_lines(child, f"@{name}", bodies={}, names_matter=False)]
    return "\n".join(lines) + "\n"


def structure_text(gm: GraphModule) -> str:
    """Text of one body without any name in it: equal text means the same computation on other
    operands.
    """
    return "\n".join(_graph_lines(gm, "body", bodies={}, names_matter=False))


def graph_fingerprint(gm: GraphModule) -> str:
    """Hex digest (16 characters) of the full graph text; equal across processes."""
    return hashlib.sha256(graph_text(gm).encode()).hexdigest()[:16]


def graph_diff(before: GraphModule, after: GraphModule) -> str:
    """Unified diff of two graph texts; empty when nothing changed."""
    old, new = graph_text(before).splitlines(), graph_text(after).splitlines()
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm=""))
