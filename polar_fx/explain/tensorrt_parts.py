"""What of each region would run in TensorRT engines; nothing is built, and TensorRT is not
needed.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..backends.base import ANY_SHAPE, RegionName
from ..backends.experimental.tensorrt_graph import split_for_engines
from ..library import LayerLibrary
from ..output.plain_text import count
from ..passes.base import is_size
from ..passes.keep_kv_writes import KeepKvWrites


@dataclass(frozen=True)
class EnginePart:
    """Operators that run in one engine, or between engines in torch, with how often each occurs."""

    engine: bool
    operators: dict[str, int]

    def __str__(self) -> str:
        names = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in self.operators.items())
        return (
            f"{'engine' if self.engine else 'torch '} "
            f"{count(sum(self.operators.values()), 'operator')}: {names}"
        )


@dataclass(frozen=True)
class PartitionReport:
    """What of each region would run in TensorRT engines.

    `parts` maps region names to their parts in order.
    """

    parts: dict[str, tuple[EnginePart, ...]]

    @property
    def num_engines(self) -> int:
        """Engines of each shape class; every layer of a kind and every program shares them."""
        return sum(p.engine for parts in self.parts.values() for p in parts)

    def text(self) -> str:
        """A paragraph for each region."""
        lines: list[str] = []
        for name, parts in self.parts.items():
            lines += [name, *(f"  {part}" for part in parts)]
        engines = count(self.num_engines, "engine")
        return "\n".join([*lines, f"{engines} for each shape class, shared by all programs"])


def partition_report(library: LayerLibrary, keep: Collection[str] = ()) -> PartitionReport:
    """Take every region of a library apart, as captured on its device; builds nothing and needs no
    TensorRT.
    """
    bodies = dict(library.bodies)
    for name in {call.target for call in library.layers}:
        kv_writes = RegionName(name, ANY_SHAPE, kv_writes=True)
        bodies[kv_writes.graph] = KeepKvWrites().run(bodies[name]).graph_module
    return PartitionReport(
        {name: parts_of(split_for_engines(body, keep)) for name, body in sorted(bodies.items())}
    )


def parts_of(graph_module: GraphModule) -> tuple[EnginePart, ...]:
    """The parts of a graph that was split for engines, in the order they run."""
    parts: list[EnginePart] = []
    between: list[Node] = []

    def close() -> None:
        if names := _names(between):
            parts.append(EnginePart(False, names))
        between.clear()

    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            close()
            engine: Any = graph_module.get_submodule(str(node.target))
            parts.append(EnginePart(True, _names(engine.graph.nodes)))
        else:
            between.append(node)
    close()
    return tuple(parts)


def _names(nodes: Sequence[Node]) -> dict[str, int]:
    named = [
        n.target._schema.name
        for n in nodes
        if isinstance(n.target, torch._ops.OpOverload) and not is_size(n)
    ]
    return dict(Counter(named).most_common())
