"""Graphs of regions: what passes may leave of them, and that those of regions run through a
pipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from hand_made import (
    aten,
    flat,
    on_cpu,
    several_queries,
    several_rows,
    single_query,
    single_row,
    with_experts,
)
from polar_fx.backends import EagerBackend, InductorBackend, RegionName, ShapeClass
from polar_fx.backends.specialize import graph_of, specialize
from polar_fx.errors import CompileError
from polar_fx.passes import (
    PASSES,
    Pass,
    PassResult,
    Pipeline,
    VerifyError,
    library_pipeline,
    region_pipeline,
    verify_region,
)
from polar_fx.passes.base import copy_graph_module, role
from polar_fx.runtime.regions import ADDRESS_KV, KEEP_KV_WRITES, RegionTable
from tiny_models import tiny


def bodies() -> dict[str, GraphModule]:
    graph_module = library_pipeline().run(flat((0.5, 0.25))).graph_module
    names = dict.fromkeys(str(n.target) for n in graph_module.graph.find_nodes(op="call_module"))
    return {name: graph_module.get_submodule(name) for name in names}  # type: ignore[misc]


def layer() -> GraphModule:
    return bodies()["layer_kind_0"]


def values(gm: GraphModule) -> list[Any]:
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]


# ----------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("name", ["prologue", "layer_kind_0", "layer_kind_1", "epilogue"])
def test_every_body_is_a_region(name: str) -> None:
    verify_region(bodies()[name], values(bodies()[name]))


@pytest.mark.parametrize("name", ["keep-kv-writes", "address-kv"])
def test_so_is_what_these_passes_make_of_a_layer(name: str) -> None:
    result = region_pipeline((PASSES[name](),)).run(layer())
    assert [(r.name, r.modified) for r in result.records] == [(name, True)]
    assert result.records[0].counts
    verify_region(result.graph_module)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grouped-linear", with_experts),
        ("matvec-to-reduction", single_row),
        ("linear-to-row-kernel", several_rows),
        ("linear-to-onednn", lambda: several_rows(tokens=2)),
        ("attention-to-reduction", single_query),
        ("attention-over-blocks", several_queries),
    ],
)
def test_and_what_the_backends_passes_make(name: str, make: Callable[[], GraphModule]) -> None:
    """They leave the operands alone, which is what calls pass."""
    before = on_cpu(make())
    result = region_pipeline((PASSES[name](),), values(before)).run(before)
    assert result.modified


def test_exported_bodies_of_a_real_layer_are_regions() -> None:
    library = tiny("llama").library
    for name, body in library.bodies.items():
        table = RegionTable(library, InductorBackend(), max_length=15, store=None)
        shape = ShapeClass(None, None, 16)
        (graph, example, dynamic), _ = table._source(RegionName(name, shape))
        exported = specialize(graph, example, dynamic=dynamic)
        verify_region(exported.graph_module, values(exported.graph_module))
        assert len(values(body)) == len(values(exported.graph_module))


# ----------------------------------------------------------------------------------- what is wrong


@dataclass(frozen=True)
class _Spoils(Pass):
    """Does one of the things below to a copy."""

    name: ClassVar[str] = "spoils"
    how: str = ""

    def run(self, gm: GraphModule) -> PassResult:
        new, graph = copy_graph_module(gm)
        SPOILS[self.how][0](new, graph)
        return PassResult(new, True)


def _first(graph: Graph, wanted: str) -> Node:
    return next(n for n in graph.find_nodes(op="placeholder") if role(n) == wanted)


def _result(graph: Graph) -> Node:
    (node,) = graph.output_node().all_input_nodes
    return node


def _write_to(wanted: str) -> Callable[[GraphModule, Graph], None]:
    def spoil(gm: GraphModule, graph: Graph) -> None:
        with graph.inserting_before(graph.output_node()):
            node = graph.call_function(aten.relu_.default, (_first(graph, wanted),))
            node.meta["val"] = _first(graph, wanted).meta["val"]

    return spoil


def _view_then_write(gm: GraphModule, graph: Graph) -> None:
    weight = _first(graph, "weight")
    with graph.inserting_before(graph.output_node()):
        view = graph.call_function(aten.t.default, (weight,))
        view.meta["val"] = weight.meta["val"].t()
        graph.call_function(aten.relu_.default, (view,)).meta["val"] = view.meta["val"]


def _hold(gm: GraphModule, graph: Graph) -> None:
    gm.register_buffer("own", torch.ones(2))
    with graph.inserting_before(graph.output_node()):
        graph.get_attr("own").meta["val"] = torch.ones(2)


def _call_method(gm: GraphModule, graph: Graph) -> None:
    with graph.inserting_before(graph.output_node()):
        graph.call_method("relu", (_result(graph),))


def _return_literal(gm: GraphModule, graph: Graph) -> None:
    graph.output_node().args = ((_result(graph), 3),)


def _return_nothing(gm: GraphModule, graph: Graph) -> None:
    graph.output_node().args = ((),)


def _forget_value(gm: GraphModule, graph: Graph) -> None:
    del next(n for n in graph.nodes if n.op == "call_function").meta["val"]


def _new_operand(gm: GraphModule, graph: Graph) -> None:
    with graph.inserting_after(_first(graph, "hidden")):
        graph.placeholder("more").meta = {"val": torch.ones(2)}


def _other_dtype(gm: GraphModule, graph: Graph) -> None:
    weight = _first(graph, "weight")
    weight.meta["val"] = weight.meta["val"].to(torch.float16)


def _other_role(gm: GraphModule, graph: Graph) -> None:
    _first(graph, "weight").meta["role"] = "hook"


SPOILS: dict[str, tuple[Callable[[GraphModule, Graph], None], str]] = {
    "writes to a weight": (_write_to("weight"), r"writes to \w+, a weight"),
    "writes to the hidden state": (_write_to("hidden"), r"writes to \w+, a hidden"),
    "writes to a view": (_view_then_write, r"writes to \w+, a weight"),
    "holds a tensor": (_hold, "holds own of its own"),
    "calls a method": (_call_method, "is a call_method; regions call operators"),
    "returns a literal": (_return_literal, "returns 3, which is no tensor"),
    "returns nothing": (_return_nothing, "must return something"),
    "forgets a value": (_forget_value, "has no example value"),
    "takes one more": (_new_operand, r"takes \d+ operands where its calls pass \d+"),
    "takes another dtype": (_other_dtype, r"is torch.float16\[.*\] where calls pass torch.float32"),
    "takes another role": (_other_role, "is a hook"),
}


@pytest.mark.parametrize("how", SPOILS)
def test_a_pass_that_spoils_a_region_is_caught(how: str) -> None:
    body = layer()
    with pytest.raises(VerifyError, match=SPOILS[how][1]):
        region_pipeline((_Spoils(how),), values(body)).run(body)
    assert Pipeline((_Spoils(how),), verify_each=False).run(body).modified


# ------------------------------------------------------------------------------- where they are run


def test_a_backends_pass_at_fault_is_named() -> None:
    table = RegionTable(
        tiny("llama").library,
        InductorBackend(passes=(_Spoils("calls a method"),)),
        max_length=15,
        store=None,
    )
    with pytest.raises(
        CompileError, match=r"\(spoils\{.*\}\) cannot be used .*call_method.*passes="
    ):
        table.one(RegionName("epilogue", ShapeClass(None, None, 16)))


def test_passes_of_a_backend_keep_operands_of_exported_graphs() -> None:
    table = RegionTable(tiny("llama").library, InductorBackend(), max_length=15, store=None)
    name = RegionName("epilogue", ShapeClass(1, 1, 16))
    (graph, example, dynamic), _ = table._source(name)
    exported = specialize(graph, example, dynamic=dynamic)
    assert graph_of(exported, InductorBackend().passes) is not exported.graph_module


def test_a_tables_own_passes_run_by_name_and_join_the_key() -> None:
    table = RegionTable(tiny("llama").library, EagerBackend(), max_length=15, store=None)
    dense, addressed = ShapeClass(1, None, 16), ShapeClass(1, None, None)
    for name, passes in (
        (RegionName("layer_kind_0", dense), ()),
        (RegionName("layer_kind_0", dense, kv_writes=True), (KEEP_KV_WRITES,)),
        (RegionName("layer_kind_0", addressed), (ADDRESS_KV,)),
        (RegionName("layer_kind_0", addressed, kv_writes=True), (ADDRESS_KV, KEEP_KV_WRITES)),
        (RegionName("prologue", addressed), ()),  # it has no keys and values
    ):
        (graph, _, _), records = table._source(name)
        for made, asked in zip(records, passes, strict=True):
            assert made.name == asked.name
        assert table.key(name).passes == "+".join(p.content_id for p in passes)
        roles = [role(n) for n in graph.graph.find_nodes(op="placeholder")]
        assert ("blocks" in roles) == (ADDRESS_KV in passes)
        verify_region(graph)
