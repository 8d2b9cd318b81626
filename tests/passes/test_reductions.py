"""The passes that write kernels out as sums, and the one that keeps KV writes alone: what they
compute, and leave alone.

Shape legend: H KV heads, G groups (query heads per KV head), L KV length, E key size, F value size.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import linear, scaled_dot_product_attention

from hand_made import Builder, aten, flat, on_cpu, single_row
from polar_fx.library import LayerLibrary
from polar_fx.library.library import Call
from polar_fx.passes import PASSES, Pipeline, library_pipeline
from polar_fx.passes.base import Pass, PassError
from polar_fx.passes.keep_kv_writes import KeepKvWrites
from polar_fx.passes.matvec_to_reduction import MatvecToReduction
from tiny_models import tiny
from traced import calls_of, traced

ATTENTION: Pass = PASSES["attention-to-reduction"]()


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 10 * len(shape))).to(
        dtype
    )


# --------------------------------------------------------------------------- attention to reduction


def _attention(
    heads: int = 2, groups: int = 1, *, length: int = 7, value_size: int = 8, **options: Any
) -> tuple[Any, list[Tensor]]:
    """A function of q, k, v and maybe a mask, and operands for it."""
    mask = options.pop("mask", None)
    sizes = ((1, heads * groups, 1, 8), (1, heads, length, 8), (1, heads, length, value_size))
    operands = [_normal(*size, seed=i) for i, size in enumerate(sizes)]
    options = {"enable_gqa": groups > 1, **options}
    return lambda q, k, v, *m: scaled_dot_product_attention(q, k, v, *m, **options), operands + (
        [] if mask is None else [mask]
    )


def _seen(*shape: int) -> Tensor:
    """A random mask that shows every row its first column."""
    return (_normal(*shape, seed=3) > 0).index_fill(-1, torch.tensor([0]), True)


CASES: dict[str, tuple[Any, list[Tensor]]] = {
    "every head its own keys": _attention(heads=4),
    "grouped heads": _attention(heads=2, groups=3),
    "one KV head for all": _attention(heads=1, groups=4),
    "one head": _attention(heads=1),
    "a single column": _attention(groups=2, length=1),
    "many columns": _attention(groups=2, length=528, mask=_seen(1, 1, 1, 528)),
    "boolean mask": _attention(groups=2, mask=_seen(1, 1, 1, 7)),
    "boolean mask per head": _attention(groups=2, mask=_seen(1, 4, 1, 7)),
    "float mask": _attention(groups=2, mask=_normal(1, 1, 1, 7, seed=4)),
    "float mask per head": _attention(groups=2, mask=_normal(1, 4, 1, 7, seed=4)),
    "additive mask of -inf": _attention(
        groups=2, mask=torch.zeros(1, 1, 1, 7).masked_fill(~_seen(1, 1, 1, 7), float("-inf"))
    ),
    "explicit scale": _attention(groups=2, scale=0.7),
    "scale of zero": _attention(groups=2, scale=0.0),
    "values of another size": _attention(groups=2, value_size=12),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_of_one_token_becomes_sums(name: str) -> None:
    function, operands = CASES[name]
    result = ATTENTION.run(traced(function, *operands))
    assert result.counts == {"attentions rewritten": 1}
    assert not calls_of(result.graph_module, aten.scaled_dot_product_attention.default)
    (got,), want = result.graph_module(*operands), function(*operands)
    assert got.dtype == want.dtype and got.shape == want.shape and want.abs().sum() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_a_query_laid_out_in_another_order_is_read_as_it_is() -> None:
    """The rewriting names memory itself (as_strided), so it must bring the operand into that order
    first.
    """
    function, (q, k, v) = _attention(heads=2, groups=2)
    shuffled = q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(shuffled, q) and not shuffled.is_contiguous()
    gm = ATTENTION.run(traced(function, shuffled, k, v)).graph_module
    torch.testing.assert_close(gm(shuffled, k, v)[0], function(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_attention_is_summed_in_float32(dtype: torch.dtype) -> None:
    function, operands = _attention(heads=8, groups=3, length=300, mask=_seen(1, 1, 1, 300))
    half = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    gm = ATTENTION.run(traced(function, *half)).graph_module
    exact = function(*(h.double() if h.is_floating_point() else h for h in half))
    got, kernel = gm(*half)[0], function(*half)
    assert got.dtype == dtype
    assert (got - exact).square().mean() <= 1.05 * (kernel - exact).square().mean()
    # a sum in `dtype` is far off
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


def _other(**change: Any) -> tuple[Any, list[Tensor]]:
    return _attention(groups=2, **change)


def _taller(rows: int, tokens: int) -> tuple[Any, list[Tensor]]:
    function, operands = _attention(groups=2)
    return function, [
        operands[0].expand(rows, -1, tokens, -1).contiguous(),
        *(o.expand(rows, -1, -1, -1) for o in operands[1:]),
    ]


LEFT_ALONE = {
    "two rows": _taller(2, 1),
    "two query tokens": _taller(1, 2),
    "dropout": _other(dropout_p=0.5),
    "causal": _other(is_causal=True),
    "a mask of two axes": _other(mask=torch.ones(1, 7, dtype=torch.bool)),
    "keys of more heads than values": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [_normal(1, 4, 1, 8), _normal(1, 4, 7, 8), _normal(1, 2, 7, 8)],
    ),
    "keys of more rows than queries": (
        scaled_dot_product_attention,
        [_normal(1, 4, 1, 8), _normal(2, 4, 7, 8), _normal(2, 4, 7, 8)],
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_attention_that_is_not_of_one_plain_token_stays(name: str) -> None:
    function, operands = LEFT_ALONE[name]
    gm = traced(function, *operands)
    assert calls_of(gm, aten.scaled_dot_product_attention.default) == 1, (
        "there is something to leave alone"
    )
    result = ATTENTION.run(gm)
    assert not result.modified and result.graph_module is gm


def test_attention_elsewhere_or_of_unknown_size_stays() -> None:
    function, operands = _attention()
    by_hand = Builder()
    names = [by_hand.placeholder(n, *o.shape) for n, o in zip("qkv", operands, strict=True)]
    on_meta = by_hand.build(by_hand.call(aten.scaled_dot_product_attention.default, *names))
    assert not ATTENTION.run(on_meta).modified, "example values on the meta device: not the CPU"
    assert ATTENTION.run(on_cpu(on_meta)).modified
    unknown = traced(function, *operands, dynamic=[{}, {2: "tokens"}, {2: "tokens"}])
    assert (
        calls_of(unknown, aten.scaled_dot_product_attention.default) == 1
        and not ATTENTION.run(unknown).modified
    )
    assert not ATTENTION.run(tiny("llama").captured.graph_module).modified, "symbolic sizes"


# ------------------------------------------------------------------------------ matvec to reduction


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [8, 6, 3])
def test_rows_are_summed_in_streams_where_their_count_allows(streams: int, count: int) -> None:
    x, w, b = _normal(1, 1, 16), _normal(count, 16), _normal(count)
    gm = traced(linear, x, w, b)
    result = MatvecToReduction(streams).run(gm)
    in_streams = streams if count % streams == 0 else 1
    assert calls_of(result.graph_module, aten.sum.dim_IntList) == in_streams
    assert calls_of(result.graph_module, aten.slice.Tensor) == (in_streams if in_streams > 1 else 0)
    torch.testing.assert_close(result.graph_module(x, w, b)[0], linear(x, w, b), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        MatvecToReduction(streams).run(traced(linear, x, w)).graph_module(x, w)[0], linear(x, w)
    )


def test_a_row_that_several_linears_read_is_widened_once() -> None:
    x, *weights = (
        t.bfloat16()
        for t in (_normal(1, 1, 16), _normal(8, 16), _normal(8, 16, seed=1), _normal(4, 16))
    )
    gm = traced(lambda x, q, k, v: (linear(x, q), linear(x, k), linear(x, v)), x, *weights)
    new = MatvecToReduction().run(gm).graph_module
    row = next(iter(new.graph.find_nodes(op="placeholder")))
    assert [n.target for n in row.users] == [aten.to.dtype] and calls_of(
        new, aten.as_strided.default
    ) == 1
    for got, w in zip(new(x, *weights), weights, strict=True):
        torch.testing.assert_close(
            got,
            linear(x.double(), w.double()).bfloat16(),
            rtol=torch.finfo(torch.bfloat16).eps,
            atol=0,
        )


def test_a_row_with_gaps_is_read_as_it_is() -> None:
    x, w = _normal(1, 1, 32), _normal(8, 16)
    gm = MatvecToReduction().run(traced(lambda x, w: linear(x[..., ::2], w), x, w)).graph_module
    torch.testing.assert_close(gm(x, w)[0], linear(x[..., ::2], w))
    wide = _normal(1, 1, 1).expand(1, 1, 16)
    gm = (
        MatvecToReduction()
        .run(traced(lambda x, w: linear(x.expand(1, 1, 16), w), wide[..., :1], w))
        .graph_module
    )
    torch.testing.assert_close(gm(wide[..., :1], w)[0], linear(wide, w))


def test_a_row_cut_out_of_a_longer_one_is_read_where_it_is() -> None:
    x, w = _normal(1, 1, 32), _normal(8, 16)
    gm = MatvecToReduction().run(traced(lambda x, w: linear(x[..., 16:], w), x, w)).graph_module
    torch.testing.assert_close(gm(x, w)[0], linear(x[..., 16:], w))


def test_half_precision_linears_are_summed_in_float32() -> None:
    x, w = _normal(1, 1, 512).bfloat16(), _normal(256, 512).bfloat16()
    got = MatvecToReduction().run(traced(linear, x, w)).graph_module(x, w)[0]
    kernel, exact = linear(x, w), linear(x.double(), w.double())
    assert (got - exact).square().mean() <= 1.05 * (kernel - exact).square().mean()
    torch.testing.assert_close(
        got, exact.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-4
    )


def test_a_weight_of_one_axis_stays() -> None:
    x, w = _normal(1, 1, 16), _normal(16)
    gm = traced(linear, x, w)
    assert calls_of(gm, aten.linear.default) == 1 and not MatvecToReduction().run(gm).modified


@pytest.mark.parametrize("streams", [0, -1])
def test_streams_that_are_none_are_refused(streams: int) -> None:
    with pytest.raises(ValueError, match=f"streams must be at least 1, got {streams}"):
        MatvecToReduction(streams)
    with pytest.raises(
        ValueError,
        match=f"bad options of matvec-to-reduction: streams must be at least 1, got {streams}",
    ):
        Pipeline.parse(f'matvec-to-reduction{{"streams":{streams}}}')


def test_another_number_of_streams_is_another_pass() -> None:
    assert len({MatvecToReduction(n).content_id for n in (1, 2, 4)}) == 3
    assert Pipeline.parse('matvec-to-reduction{"streams":2}') == Pipeline((MatvecToReduction(2),))


# ----------------------------------------------------------------------------------- keep KV writes

# of each family's first kind of layer: linears in all, and those that keys and values need
LINEARS = {
    "llama": (7, 2),
    "gemma2": (7, 2),
    "gpt2": (4, 1),
    "phi3": (4, 1),
    "deepseek_v3": (8, 1),
    "qwen2_moe": (9, 2),
}


def _given(library: LayerLibrary, call: Call) -> list[Tensor]:
    """Operands of two rows of three tokens: the layer's weights, and numbers where the values do
    not matter.
    """
    made = [
        o.example({"B": 2, "T": 3, "L": 8}, library.device)
        for o in library.table.bodies[call.target].operands
    ]
    for i, operand in enumerate(made[: -len(call.weights)]):
        numbers = torch.arange(operand.numel()).reshape(operand.shape)
        operand.copy_(torch.sin(numbers + i) if operand.is_floating_point() else numbers % 3)
    return [*made[: -len(call.weights)], *call.weights]


@pytest.mark.parametrize("family", LINEARS)
def test_what_is_left_writes_the_same_bits(family: str) -> None:
    library = tiny(family).library
    for call in {c.target: c for c in library.layers}.values():
        whole = library.bodies[call.target]
        kept = KeepKvWrites().run(whole).graph_module
        given = _given(library, call)
        before, mine = copy.deepcopy(given), copy.deepcopy(given)
        with torch.no_grad():
            whole(*given)
            kept(*mine)
        written = 0
        for spec, old, want, got in zip(
            library.table.bodies[call.target].operands, before, given, mine, strict=True
        ):
            assert torch.equal(got, want), f"{spec.role} of {call.target}"
            written += not torch.equal(old, want)
        assert written == 2, "keys and values, and nothing else"


def _operand_roles(graph_module: GraphModule) -> list[str]:
    return [n.meta["role"] for n in graph_module.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("family", LINEARS)
def test_attention_and_feed_forward_are_dropped(family: str) -> None:
    whole = next(iter(tiny(family).library.bodies[c.target] for c in tiny(family).library.layers))
    result = KeepKvWrites().run(whole)
    linears = [
        calls_of(gm, aten.linear.default, aten.addmm.default) for gm in (whole, result.graph_module)
    ]
    assert tuple(linears) == LINEARS[family]
    left = {str(n.target) for n in result.graph_module.graph.nodes}
    assert not left & {
        "aten.scaled_dot_product_attention.default",
        "aten.silu.default",
        "aten.gelu.default",
        "aten.tanh.default",
    }
    assert _operand_roles(result.graph_module) == _operand_roles(whole), "the call does not change"
    assert result.counts == {
        "nodes": f"{len(whole.graph.nodes)} -> {len(result.graph_module.graph.nodes)}"
    }


def _assembled() -> GraphModule:
    """Keys put together in place, as some modeling code does, then written through a view."""
    b = Builder()
    x, slot = (
        b.placeholder("x", 2, 3, role="hidden"),
        b.placeholder("kv_0_0", 2, 4, 3, role="kv", slot=0, part=0),
    )
    keys = b.call(aten.new_empty.default, x, [2, 3])
    for where, made in ((slice(0, 1), aten.neg.default), (slice(1, 3), aten.exp.default)):
        part = b.call(made, b.call(aten.slice.Tensor, x, 1, where.start, where.stop))
        b.call(
            aten.copy_.default, b.call(aten.slice.Tensor, keys, 1, where.start, where.stop), part
        )
    b.call(aten.copy_.default, b.call(aten.select.int, slot, 1, 2), keys)
    b.call(aten.mul_.Tensor, keys, 2.0)  # after the write: nobody reads it
    return b.build(b.call(aten.relu.default, keys))


def test_writes_in_place_that_a_kept_value_needs_stay() -> None:
    whole = _assembled()
    kept = KeepKvWrites().run(whole).graph_module
    assert not calls_of(kept, aten.mul_.Tensor, aten.relu.default)
    x, want, got = _normal(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    whole(x, want)
    kept(x, got)
    assert torch.equal(got, want) and torch.equal(
        got[:, 2], torch.cat([-x[:, :1], x[:, 1:].exp()], 1)
    )


def test_the_result_is_a_zero_that_an_exported_graph_may_return() -> None:
    layer = library_pipeline().run(flat()).graph_module.get_submodule("layer_kind_0")
    assert isinstance(layer, GraphModule)
    gm = KeepKvWrites().run(layer).graph_module
    operands = [
        torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype)
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    assert torch.equal(gm(*operands), torch.zeros(1))


def test_a_graph_that_writes_nothing_is_refused() -> None:
    with pytest.raises(
        PassError,
        match="keep-kv-writes: the graph writes no keys, values or states; run it on the graph of "
        "one layer",
    ):
        KeepKvWrites().run(on_cpu(single_row()))
