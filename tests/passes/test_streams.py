"""Hidden states that are not [B, T, d]: outline-layers permutes them between layers, so that rows
and tokens are the first two axes of what every body takes and gives.

Shape legend: S streams (7), B batch, T tokens, d hidden size.
"""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hand_made import B, Builder, D, L, T, V, aten, flat, run
from polar_fx.passes import PassError, graph_text, library_pipeline, verify
from polar_fx.passes.base import body, layer_calls, role
from polar_fx.passes.hidden_states import rows_and_tokens_first

S = 7
LAYOUTS = ("SBTd", "BSTd", "TBSd", "dSTB", "BTSd")


def streams(layout: str) -> GraphModule:
    """Two layers that hand on streams in this order of axes; after each has made its own, it writes
    into a part of it.
    """
    b = Builder()
    ids = b.placeholder("input_ids", B, T, dtype=torch.long)
    positions = b.placeholder("positions", B, T, dtype=torch.long)
    b.placeholder("kv_index", L, dtype=torch.long)
    slots = [b.slot(0), b.slot(1)]
    table = b.weight("embedding", V, D)
    embedded = b.call(aten.embedding.default, table, ids)
    hidden = _in(b, b.call(aten.stack.default, [embedded] * S, 2), layout=layout)
    rows = b.call(
        aten.unsqueeze.default, b.call(aten.arange.default, B, device=torch.device("cpu")), 1
    )
    for layer in (0, 1):
        b.layer = layer
        weight = b.weight(f"layers_{layer}_weight", S, D)
        taken = b.call(aten.mul.Tensor, _out(b, hidden, layout=layout), weight)
        first = b.call(aten.unsqueeze.default, b.call(aten.select.int, taken, 2, 0), 2)
        for slot in slots[layer]:
            b.call(aten.index_put_.default, slot, [rows, None, positions], first)
        hidden = _in(b, b.call(aten.add.Tensor, taken, first), layout=layout)
        part = b.call(aten.select.int, hidden, layout.index("S"), 1)
        b.call(aten.mul_.Tensor, part, 3.0)
    b.layer = None
    mean = b.call(aten.mean.dim, _out(b, hidden, layout=layout), [2])
    return b.build(b.call(aten.linear.default, mean, table))


def _in(b: Builder, node: Node, *, layout: str) -> Node:
    """Streams [B, T, S, d] in an order of axes, without gaps."""
    order = list(map("BTSd".index, layout))
    return b.call(aten.contiguous.default, b.call(aten.permute.default, node, order))


def _out(b: Builder, node: Node, *, layout: str) -> Node:
    """The inverse, as a view of the memory: it holds of operands without gaps alone."""
    sizes = dict(B=B, T=T, S=S, d=D)
    flat = b.call(aten.view.default, node, [-1])
    shaped = b.call(aten.view.default, flat, [sizes[axis] for axis in layout])
    return b.call(aten.permute.default, shaped, list(map(layout.index, "BTSd")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_body_takes_and_gives_rows_and_tokens_first(layout: str) -> None:
    gm = library_pipeline().run(streams(layout)).graph_module
    verify(gm)
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    found = []
    for call in calls:
        graph = body(gm, call).graph
        found += [n.meta["val"] for n in graph.nodes if role(n) == "hidden"]
    found += [call.meta["val"] for call in layer_calls(gm)]
    rest = tuple({"S": S, "d": D}[axis] for axis in layout if axis in "Sd")
    assert len(found) == 5
    assert all(tuple(value.shape) == (B, T, *rest) and value.is_contiguous() for value in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_are_preserved_to_the_bit(layout: str) -> None:
    want, want_slots = run(streams(layout))
    got, got_slots = run(library_pipeline().run(streams(layout)).graph_module)
    same, _ = run(rows_and_tokens_first(streams(layout)))
    assert want.abs().sum() > 0 and torch.equal(got, want) and torch.equal(same, want)
    assert all(torch.equal(a, b) for a, b in zip(got_slots, want_slots, strict=True))


def test_equal_layers_are_one_body() -> None:
    gm = library_pipeline().run(streams("SBTd")).graph_module
    assert {call.target for call in layer_calls(gm)} == {"layer_kind_0"}


def test_input_is_left_alone_and_a_second_run_changes_nothing() -> None:
    gm = streams("SBTd")
    before = graph_text(gm)
    once = rows_and_tokens_first(gm)
    assert graph_text(gm) == before != graph_text(once)
    assert rows_and_tokens_first(once) is once


def test_one_stream_stays_as_it_is() -> None:
    for gm in (flat(), streams("BTSd")):
        assert rows_and_tokens_first(gm) is gm


def test_hidden_states_without_an_axis_of_tokens_are_refused() -> None:
    gm = streams("SBTd")
    ids = next(n for n in gm.graph.nodes if n.name == "input_ids")
    ids.meta["val"] = torch.empty(B, 11, device="meta")
    with pytest.raises(
        PassError, match=r"sizes \[7, 2, 3, 4\], without one of 2 rows and one of 11"
    ):
        library_pipeline().run(gm)


def test_what_is_written_late_is_handed_on() -> None:
    """The permutation comes after the last write into a hidden state."""
    gm = library_pipeline().run(streams("SBTd")).graph_module
    call = layer_calls(gm)[0]
    hidden = torch.ones(B, T, S, D)
    operands: list[Tensor] = []
    for node in body(gm, call).graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        operands.append(torch.ones(value.shape, dtype=value.dtype))
    assert operands[0].shape == hidden.shape
    made = body(gm, call)(*operands)
    made = made[0] if isinstance(made, tuple) else made
    assert torch.equal(made, 2 * hidden * (1 + 2 * (torch.arange(S) == 1)[:, None]))
