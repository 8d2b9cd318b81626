"""What a pass is, what it returns, and how passes are found by name.

A pass maps a graph to a graph and leaves its input alone. It is a frozen dataclass: its fields are
its whole configuration, so its text form (`spec`) parses back and its content id can join a variant
key.
"""

import functools
import hashlib
import json
import operator
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .sources import module_digest
from .torch_types import schema


class PassError(Exception):
    """A pass met a graph it cannot take: which pass, what it saw, what to do."""

    def __init__(self, pass_name: str, problem: str, remedy: str) -> None:
        super().__init__(f"{pass_name}: {problem}; {remedy}")
        self.pass_name = pass_name


@dataclass(frozen=True)
class PassResult:
    """Outcome of one pass.

    `modified` is true only if the graph changed; `counts` is for the log.
    """

    graph_module: GraphModule
    modified: bool
    counts: Mapping[str, int | str] = field(default_factory=dict[str, int | str])


@dataclass(frozen=True)
class Pass(ABC):
    """One graph-to-graph transformation.

    Class attributes: `name` (kebab case, unique), `preserves_numerics` (bitwise equal results when
    the graph is interpreted).
    """

    name: ClassVar[str]
    preserves_numerics: ClassVar[bool] = True

    @abstractmethod
    def run(self, gm: GraphModule) -> PassResult:
        """Return the transformed graph; raises PassError on a graph outside the pass's contract."""

    def options(self) -> dict[str, Any]:
        """Configuration as plain JSON values."""
        return {f.name: json.loads(json.dumps(getattr(self, f.name))) for f in fields(self)}

    def spec(self) -> str:
        """Text form: the name, then the options as JSON when there are any."""
        options = self.options()
        return self.name + (json.dumps(options, separators=(",", ":")) if options else "")

    @property
    def content_id(self) -> str:
        """Id of the pass's configuration and source, for cache keys: 16 hex digits, equal in every
        process and installation.

        The source is the module of its class and of each base class, with what these import from
        their own folders and from this package. A class without a source file, such as one typed
        into an interpreter, has another id in every process, so that nothing stale is found by it.
        """
        sources = [_source_of(kind) for kind in type(self).__mro__ if issubclass(kind, Pass)]
        return hashlib.sha256(json.dumps([self.spec(), *sources]).encode()).hexdigest()[:16]


@functools.cache
def _source_of(kind: type[Pass]) -> str:
    """The class by name, and a fingerprint of the source it is written in."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or not file.endswith(".py") or not Path(file).is_file():
        return f"{kind.__qualname__} {uuid.uuid4().hex}"
    return f"{kind.__qualname__} {module_digest(Path(file))}"


def copy_graph_module(gm: GraphModule) -> tuple[GraphModule, Graph]:
    """Copy the graph, share every tensor and submodule; node metadata is copied too."""
    graph = Graph()
    value, old = cast(tuple[Node, Node], graph.graph_copy(gm.graph, {}, return_output_node=True))
    graph.output(value).meta.update(old.meta)
    return GraphModule(gm, graph), graph


def replace_each(
    gm: GraphModule,
    wanted: Callable[[Node], bool],
    *,
    make: Callable[[Graph, Node], Node],
    what: str,
) -> PassResult:
    """Replace each wanted node by what `make` adds to the graph before it; `what` names their count
    in the result.
    """
    if not any(map(wanted, gm.graph.nodes)):
        return PassResult(gm, False)
    new, graph = copy_graph_module(gm)
    found = list(filter(wanted, graph.nodes))
    for node in found:
        with graph.inserting_before(node):
            node.replace_all_uses_with(make(graph, node))
        graph.erase_node(node)
    new.recompile()
    return PassResult(new, True, {what: len(found)})


class Caller:
    """Adds operators to a graph, each with the value it would have, and the place in the model of
    `origin`.
    """

    def __init__(self, graph: Graph, origin: Node) -> None:
        self.graph, self.origin = graph, origin

    def __call__(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta = {**self.origin.meta, "val": target(*map_arg(args, lambda n: n.meta["val"]))}
        return node

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """`node` in that dtype; itself if it is already."""
        return (
            node if node.meta["val"].dtype == dtype else self(torch.ops.aten.to.dtype, node, dtype)
        )

    def dense(self, node: Node) -> Node:
        """`node` without gaps, in the order of its axes; itself if it is already."""
        return (
            node
            if node.meta["val"].is_contiguous()
            else self(torch.ops.aten.contiguous.default, node)
        )


def kind(node: Node) -> str | None:
    """`prologue`, `layer` or `epilogue` for an outlined call."""
    return node.meta.get("kind")


def role(node: Node) -> str | None:
    """`input`, `kv` or `state` for a placeholder of the program; also `hidden`, `side`, `weight`
    inside a body.
    """
    return node.meta.get("role")


def is_size(node: Node) -> bool:
    """Whether its value is a size, not a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def in_slot(node: Node) -> bool:
    """Whether it is a part of a step's slot: keys, values, or a state."""
    return role(node) in ("kv", "state")


def writes(node: Node) -> bool:
    """Whether it is an operator that writes into memory it is given."""
    found = schema(node)
    return found is not None and found.is_mutable


def storage(node: Node) -> Node:
    """The node whose memory this one is, or is a view of."""
    while node.args and isinstance(node.args[0], Node):
        found = schema(node)
        aliases = found is not None and any(r.alias_info for r in found.returns)
        if not aliases and cast(object, node.target) is not operator.getitem:
            break
        node = node.args[0]
    return node


def writes_slot(gm: GraphModule) -> bool:
    """Whether the graph of a layer writes into its slot, or a view of a part of it: one that does
    not may read that of another layer.
    """
    return any(writes(n) and in_slot(storage(n)) for n in gm.graph.nodes)


def layer_calls(gm: GraphModule) -> list[Node]:
    """The outlined layer calls in execution order; empty for a flat graph."""
    return [n for n in gm.graph.nodes if n.op == "call_module" and kind(n) == "layer"]


def body(gm: GraphModule, call: Node) -> GraphModule:
    """The graph that an outlined call runs."""
    module = gm.get_submodule(str(call.target))
    assert isinstance(module, GraphModule)
    return module
