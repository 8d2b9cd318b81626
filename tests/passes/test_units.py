"""What each pass does, and refuses, on graphs made for the question."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hand_made import Builder, aten, flat, on_cpu, operands, run, single_row
from polar_fx.passes import (
    PASSES,
    PassError,
    VerifyError,
    flat_pipeline,
    library_pipeline,
    program_pipeline,
    verify,
)
from polar_fx.passes.base import copy_graph_module, kind, layer_calls
from polar_fx.passes.schedule_layers import Blends, ScheduleLayers
from tiny_models import tiny


def library(scales: tuple[float, ...] = (0.5, 0.5, 0.25), **options: bool) -> GraphModule:
    return library_pipeline().run(flat(scales, **options)).graph_module


# ----------------------------------------------------------------------------- no-ops and dead code


def _called(gm: GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def _unary(build: Any) -> GraphModule:
    b = Builder()
    x = b.placeholder("x", 2, 3)
    return b.build(build(b, x))


NOOPS = {
    "conversion to its own dtype": lambda b, x: b.call(
        aten.relu.default, b.call(aten.to.dtype, x, torch.float32)
    ),
    "full slice": lambda b, x: b.call(
        aten.relu.default, b.call(aten.slice.Tensor, x, 0, 0, 2**63 - 1)
    ),
    "dropout at inference": lambda b, x: b.call(
        aten.relu.default, b.call(aten.dropout.default, x, 0.5, False)
    ),
    "alias": lambda b, x: b.call(aten.relu.default, b.call(aten.alias.default, x)),
}
KEPT = {
    "conversion to another dtype": lambda b, x: b.call(
        aten.relu.default, b.call(aten.to.dtype, x, torch.float16)
    ),
    "a copy": lambda b, x: b.call(
        aten.relu.default, b.call(aten.to.dtype, x, torch.float32, False, True)
    ),
    "part of a slice": lambda b, x: b.call(
        aten.relu.default, b.call(aten.slice.Tensor, x, 0, 1, 2**63 - 1)
    ),
    "every second row": lambda b, x: b.call(
        aten.relu.default, b.call(aten.slice.Tensor, x, 0, 0, 2**63 - 1, 2)
    ),
    "dropout in training": lambda b, x: b.call(
        aten.relu.default, b.call(aten.dropout.default, x, 0.5, True)
    ),
}


@pytest.mark.parametrize("case", NOOPS)
def test_noops_go(case: str) -> None:
    result = PASSES["eliminate-noops"]().run(_unary(NOOPS[case]))
    assert result.modified and _called(result.graph_module) == [aten.relu.default]


@pytest.mark.parametrize("case", KEPT)
def test_what_does_something_stays(case: str) -> None:
    assert not PASSES["eliminate-noops"]().run(_unary(KEPT[case])).modified


def test_dead_values_go_and_writes_into_slots_stay() -> None:
    b = Builder()
    x, slot = b.placeholder("x", 2, 3), b.placeholder("kv_0_0", 2, 3, role="kv", slot=0, part=0)
    dead = b.weight("unused", 3)
    b.call(aten.neg.default, b.call(aten.add.Tensor, x, dead))
    b.call(aten.copy_.default, slot, x)
    result = PASSES["eliminate-dead-code"]().run(b.build(b.call(aten.relu.default, x)))
    assert _called(result.graph_module) == [
        aten.copy_.default,
        aten.relu.default,
    ]
    assert result.counts == {"dead nodes removed": 3} and not list(result.graph_module.parameters())


# ------------------------------------------------------------------------------ matvec to reduction


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.05)],
    ids=str,
)
def test_a_linear_over_one_row_becomes_a_sum(dtype: torch.dtype, tolerance: float) -> None:
    result = PASSES["matvec-to-reduction"]().run(on_cpu(single_row(dtype)))
    assert result.counts == {"linears rewritten": 2} and aten.linear.default not in _called(
        result.graph_module
    )
    torch.manual_seed(0)
    x, w1, w2, bias = (torch.randn(s).to(dtype) for s in ((1, 1, 4), (5, 4), (4, 5), (4,)))
    got = result.graph_module(x, w1, w2, bias)
    want = torch.nn.functional.linear(torch.nn.functional.linear(x, w1), w2, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def test_linears_over_more_rows_or_on_other_devices_stay() -> None:
    this = PASSES["matvec-to-reduction"]()
    assert not this.run(on_cpu(single_row(rows=2))).modified
    assert not this.run(single_row()).modified, "example values on the meta device: not the CPU"
    assert not this.run(tiny("llama").captured.graph_module).modified, "symbolic sizes"


# ------------------------------------------------------------------------------- outline and dedupe


def test_layers_that_differ_in_one_literal_stay_apart() -> None:
    assert [c.target for c in layer_calls(library((0.5, 0.25, 0.5)))] == [
        "layer_kind_0",
        "layer_kind_1",
        "layer_kind_0",
    ]
    assert {c.target for c in layer_calls(library((0.5, 0.5, 0.5)))} == {"layer_kind_0"}


def test_the_head_takes_hidden_state_and_weights_only() -> None:
    """A value made of the head's weights alone is computed in the head, wherever it was traced."""
    gm = library(head_constant=True)
    head = next(n for n in gm.graph.nodes if kind(n) == "epilogue")
    assert [a.op for a in head.args] == ["call_module", "get_attr", "get_attr"]
    assert torch.equal(run(gm)[0], run(flat((0.5, 0.5, 0.25), head_constant=True))[0])
    assert tiny("gemma2").library.epilogue.sides == ()


def _two_layers(second: Any) -> GraphModule:
    """Layer 0 adds a weight; layer 1 is up to `second`, which is given the builder, hidden state
    and more of layer 0.
    """
    b = Builder()
    x = b.placeholder("input_ids", 2, 3)
    slots = [b.placeholder(f"kv_{i}_0", 2, 3, role="kv", slot=i, part=0) for i in (0, 1)]
    start = b.call(aten.relu.default, x)
    b.layer = 0
    inner = b.call(aten.copy_.default, slots[0], start)
    hidden = b.call(aten.add.Tensor, start, inner)
    b.layer = 1
    hidden = second(b, hidden, inner, slots)
    b.layer = None
    return b.build(b.call(aten.relu.default, hidden))


def test_a_layer_that_reads_another_layers_value_is_refused() -> None:
    gm = _two_layers(lambda b, h, inner, slots: b.call(aten.add.Tensor, h, inner))
    with pytest.raises(
        PassError, match=r"layer 0 of 2 hands on 2 values .* cannot be skipped or repeated"
    ):
        PASSES["outline-layers"]().run(gm)


def _with_keys_of_its_own(b: Builder, hidden: Node, *, slots: list[Node]) -> Node:
    own = b.call(aten.copy_.default, slots[1], hidden)
    return b.call(aten.add.Tensor, b.call(aten.add.Tensor, hidden, slots[0]), own)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(
            lambda b, h, inner, slots: _with_keys_of_its_own(b, h, slots=slots), id="also its own"
        ),
        pytest.param(
            lambda b, h, inner, slots: b.call(aten.copy_.default, slots[0], h), id="writes"
        ),
    ],
)
def test_a_layer_that_shares_a_slot_but_by_reading_it_is_refused(second: Any) -> None:
    with pytest.raises(
        PassError,
        match="layer 1 reads the keys and values of layer 0; editing such a model is unsound",
    ):
        PASSES["outline-layers"]().run(_two_layers(second))


def test_a_layer_may_only_read_the_slot_of_an_earlier_one() -> None:
    """Its steps then read the slot of the latest step of that one."""
    gm = _two_layers(lambda b, h, inner, slots: b.call(aten.add.Tensor, h, slots[0]))
    outlined = PASSES["outline-layers"]().run(gm).graph_module
    verify(outlined)
    path = (0, 1, 0, 1, 1)
    steps = ScheduleLayers(path=path).run(outlined).graph_module
    assigned = PASSES["assign-kv-slots"]().run(steps)
    verify(assigned.graph_module)
    calls = layer_calls(assigned.graph_module)
    read = [call.all_input_nodes[-1].meta["slot"] for call in calls]
    assert read == [0, 0, 2, 2, 2]
    assert not PASSES["assign-kv-slots"]().run(assigned.graph_module).modified
    skipping = ScheduleLayers(path=(1, 0)).run(outlined).graph_module
    with pytest.raises(PassError, match="step 0 reads the slot 0, which no step before it writes"):
        PASSES["assign-kv-slots"]().run(skipping)


def test_a_graph_without_layers_is_left_alone() -> None:
    assert not PASSES["outline-layers"]().run(_unary(NOOPS["alias"])).modified


# ---------------------------------------------------------------- schedule, assign KV slots, inline


def _by_hand(path: tuple[int, ...], blends: Blends) -> tuple[Tensor, list[Tensor]]:
    """The bodies called one after the other, each step on slots of its own."""
    gm = library()
    values = operands(gm)[:3]
    sides = gm.get_submodule("prologue")(*values, gm.embedding)
    hidden, rows, mask = sides
    slots = [torch.zeros(2, 1, 8, 4) for _ in range(2 * len(path))]
    opened: list[Tensor] = []
    for step, layer in enumerate(path):
        opened += [hidden for start, _, _ in blends if start == step]
        call = layer_calls(gm)[layer]
        weight = getattr(gm, f"layers_{layer}_weight")
        hidden = gm.get_submodule(str(call.target))(
            hidden, rows, values[1], mask, *slots[2 * step : 2 * step + 2], weight
        )
        for _, stop, damping in reversed(blends):
            if stop == step + 1:
                before = opened.pop()
                hidden = before + damping * (hidden - before)
    return gm.get_submodule("epilogue")(hidden, gm.norm, gm.embedding), slots


PROGRAMS: dict[str, tuple[tuple[int, ...], Blends]] = {
    "identity": ((0, 1, 2), ()),
    "skip": ((0, 2), ()),
    "one layer": ((2,), ()),
    "repeat": ((0, 1, 1, 1, 2), ()),
    "backwards": ((2, 1, 0), ()),
    "damped": ((0, 1, 1, 2), ((2, 3, 0.5),)),
    "damped nested": ((0, 1, 2, 1, 2, 2), ((0, 6, 0.9), (1, 5, 0.5), (3, 5, 0.25))),
    "damped twice to the end": ((0, 1, 2), ((1, 3, 0.5), (2, 3, 0.5))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_step_graphs_compute_what_a_loop_over_the_bodies_computes(name: str) -> None:
    path, blends = PROGRAMS[name]
    gm = program_pipeline(path, blends).run(library()).graph_module
    with torch.no_grad():
        want, want_slots = _by_hand(path, blends)
    got, slots = run(gm)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert len(slots) == 2 * len(path), "one slot a step"
    for mine, theirs in zip(slots, want_slots, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_flat_graph_is_the_step_graph_to_the_bit(name: str) -> None:
    steps = program_pipeline(*PROGRAMS[name]).run(library()).graph_module
    inlined = flat_pipeline().run(steps).graph_module
    assert not [n for n in inlined.graph.nodes if n.op == "call_module"]
    (want, want_slots), (got, slots) = run(steps), run(inlined)
    assert torch.equal(got, want) and all(
        torch.equal(a, b) for a, b in zip(slots, want_slots, strict=True)
    )


def test_a_scheduled_graph_can_be_scheduled_again() -> None:
    once = program_pipeline((0, 1, 2, 2), ((2, 4, 0.5),)).run(library()).graph_module
    again = program_pipeline((0, 2)).run(once).graph_module
    assert torch.equal(run(again)[0], run(program_pipeline((0, 2)).run(library()).graph_module)[0])


@pytest.mark.parametrize(
    ("path", "message"),
    [((0, 7), r"layers \[7\] are not in the graph; use layers among \[0, 1, 2\]"), ((), "empty")],
)
def test_impossible_paths_are_refused(path: tuple[int, ...], message: str) -> None:
    with pytest.raises(PassError, match=message):
        ScheduleLayers(path).run(library())


@pytest.mark.parametrize("name", ["schedule-layers", "assign-kv-slots"])
def test_program_passes_want_outlined_layers(name: str) -> None:
    with pytest.raises(PassError, match="no outlined layer calls; run outline-layers first"):
        PASSES[name]().run(flat())


# ------------------------------------------------------------------------------------- the verifier


def _first(gm: GraphModule, op: str) -> Node:
    return next(n for n in gm.graph.nodes if n.op == op)


def _no_role(gm: GraphModule) -> None:
    _first(gm, "placeholder").meta.pop("role")


def _no_value(gm: GraphModule) -> None:
    _first(gm, "placeholder").meta.pop("val")


def _no_slot(gm: GraphModule) -> None:
    next(n for n in gm.graph.nodes if n.meta.get("role") == "kv").meta.pop("slot")


def _two_outputs(gm: GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = ((output.args[0], output.args[0]),)


def _no_kind(gm: GraphModule) -> None:
    layer_calls(gm)[0].meta["kind"] = "block"


def _too_few_operands(gm: GraphModule) -> None:
    call = layer_calls(gm)[0]
    call.args = call.args[:-1]


def _literal_operand(gm: GraphModule) -> None:
    call = layer_calls(gm)[0]
    call.args = (*call.args[:-1], 1.0)


def _slot_as_weight(gm: GraphModule) -> None:
    call = layer_calls(gm)[0]
    call.args = (*call.args[:-1], call.args[-2])


def _wrong_dtype(gm: GraphModule) -> None:
    call = layer_calls(gm)[0]
    weight = call.args[-1]
    assert isinstance(weight, Node)
    weight.meta["val"] = weight.meta["val"].to(torch.float64)


def _method_call(gm: GraphModule) -> None:
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_method("relu", (output.args[0],)),)


def _shared_slot(gm: GraphModule) -> None:
    first, second = layer_calls(gm)[:2]
    second.args = (*second.args[:4], *first.args[4:6], second.args[-1])


def _use_before_definition(gm: GraphModule) -> None:
    layer_calls(gm)[0].append(_first(gm, "placeholder"))


BROKEN = {
    _no_role: "has no role",
    _no_value: "has no example value",
    _no_slot: "names no slot",
    _two_outputs: "the logits alone",
    _no_kind: "is of no kind",
    _too_few_operands: "passes 6 of 7 operands",
    _literal_operand: "passes a literal",
    _slot_as_weight: "as weight",
    _wrong_dtype: "float64.*float32",
    _method_call: "method call",
    _shared_slot: "step 1 uses the slot kv_0_0",
    _use_before_definition: "malformed graph",
}


def test_the_verifier_accepts_every_stage() -> None:
    for gm in (flat(), library(), program_pipeline((0, 1, 1)).run(library()).graph_module):
        verify(gm)


@pytest.mark.parametrize("damage", BROKEN, ids=lambda d: d.__name__.strip("_"))
def test_the_verifier_catches(damage: Any) -> None:
    gm, _ = copy_graph_module(program_pipeline((0, 1, 2)).run(library()).graph_module)
    verify(gm)
    damage(gm)
    with pytest.raises(VerifyError, match=BROKEN[damage]):
        verify(gm)
