"""Linears as calls of one operator: which of them, over which weights, and what is read of it.

Shape legend: B rows, T tokens of each, K their size, N rows of a weight.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from hand_made import aten, several_rows
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.passes import PASSES
from polar_fx.passes.base import Pass
from traced import calls_of, traced

ROW_LINEAR = torch.ops.polar_fx.row_linear.default
THIS: Pass = PASSES["linear-to-row-kernel"]()


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 10 * len(shape)))


# x of rows and tokens, and others of the sizes that may vary: of one token, of one row, of both
MANY: dict[str, tuple[tuple[int, int], dict[int, str], tuple[tuple[int, int], ...]]] = {
    "one row": ((1, 1), {}, ((1, 1),)),
    "rows": ((3, 1), {0: "batch"}, ((2, 1), (5, 1))),
    "tokens": ((1, 3), {1: "tokens"}, ((1, 2), (1, 5))),
    "rows and tokens": ((3, 2), {0: "batch", 1: "tokens"}, ((2, 2), (5, 4))),
    "a known number of tokens": ((3, 2), {}, ((3, 2),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MANY)
def test_linears_of_any_number_of_rows_and_tokens_become_one_operator(
    name: str, dtype: torch.dtype
) -> None:
    first, axes, others = MANY[name]
    operands = [t.to(dtype) for t in (_normal(*first, 16), _normal(8, 16), _normal(8))]
    gm = traced(linear, *operands, dynamic=[axes, {}, {}])
    result = THIS.run(gm)
    assert result.counts == {"linears rewritten": 1, "calls": 1}
    assert calls_of(result.graph_module, ROW_LINEAR) == 1
    for rows, tokens in others:
        more = _normal(rows, tokens, 16, seed=rows).to(dtype)
        got = result.graph_module(more, *operands[1:])[0]
        assert torch.equal(got, linear(more, *operands[1:]))


NOT_OF_ROWS: dict[str, list[Tensor]] = {
    "no axis of tokens": [_normal(3, 16), _normal(8, 16)],
    "a weight laid out in another order": [_normal(3, 1, 16), _normal(16, 8).t()],
    "half precision": [_normal(3, 1, 16).half(), _normal(8, 16).half()],
    "float64": [_normal(3, 1, 16).double(), _normal(8, 16).double()],
}


@pytest.mark.parametrize("name", NOT_OF_ROWS)
def test_other_linears_stay(name: str) -> None:
    gm = traced(linear, *NOT_OF_ROWS[name])
    assert calls_of(gm, aten.linear.default) == 1 and not THIS.run(gm).modified


def test_linears_elsewhere_stay() -> None:
    assert not THIS.run(several_rows()).modified, "example values on the meta device: not the CPU"


@pytest.mark.parametrize("name", NOT_OF_ROWS)
def test_what_is_left_of_one_row_is_summed(name: str) -> None:
    """By the passes of the backends in their order; of float32, oneDNN takes none of it."""
    x, w = NOT_OF_ROWS[name]
    gm = traced(linear, x[:1], w)
    for each in REGION_PASSES:
        gm = each.run(gm).graph_module
    assert calls_of(gm, aten.sum.dim_IntList) > 0
    assert not any("linear" in str(n.target) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(x[:1], w)[0], linear(x[:1], w), rtol=1e-2, atol=1e-2)


def _made(x: Tensor, *others: Tensor) -> Tensor:
    weight, bias = others
    return linear(x, weight.float() * 2, bias)


def test_a_weight_that_the_graph_makes_is_read_as_it_is_made_for_one_row() -> None:
    """It would be written to memory first otherwise."""
    for rows in (1, 3):
        operands = [_normal(rows, 1, 16), _normal(8, 16).bfloat16(), _normal(8)]
        assert THIS.run(traced(_made, *operands)).modified == (rows > 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bias_of_one_number_for_all_is_left_to_others(rows: int) -> None:
    gm = traced(linear, _normal(rows, 1, 16), _normal(8, 16), _normal(1))
    assert not THIS.run(gm).modified


# ------------------------------------------------------------------------- over the same rows


def _operands(rows: int, tokens: int = 1) -> list[Tensor]:
    """x [B, T, 16], three weights, and a bias of the last one."""
    weights = [_normal(n, 16, seed=n) for n in (8, 4, 6)]
    return [_normal(rows, tokens, 16), *weights, _normal(6)]


def _three(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _ = others
    batch, tokens, _size = x.shape
    heads = linear(x, q).view(batch, tokens, 2, 4).transpose(1, 2)
    return heads.reshape(batch, 2, -1), linear(x, k), linear(x, v) * 2


@pytest.mark.parametrize("rows", [1, 3])
def test_linears_over_the_same_token_are_one_call(rows: int) -> None:
    """Their parts may be viewed, and results of the graph have no gaps."""
    operands = _operands(rows)
    gm = traced(_three, *operands, dynamic=[{0: "batch"} if rows > 1 else {}, {}, {}, {}, {}])
    result = THIS.run(gm)
    assert result.counts == {"linears rewritten": 3, "calls": 1}
    got = result.graph_module(*operands)
    for mine, want in zip(got, _three(*operands), strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, want)


def test_linears_over_the_same_tokens_are_not() -> None:
    operands = _operands(3, 2)
    result = THIS.run(traced(_three, *operands))
    assert result.counts == {"linears rewritten": 3, "calls": 3}


def _flattened(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    q, k, *_ = others
    a, b, c = linear(x, q), linear(x, k), linear(x, k + 1)
    halves = a.chunk(2)
    stored = c.new_zeros(2, *c.shape)
    stored[1].copy_(b)
    return (
        a.squeeze(1).view(-1),
        b.transpose(0, 1).view(1, -1),
        halves[0].view(-1),
        stored.view(-1),
    )


def test_views_of_views_of_parts_may_need_a_copy() -> None:
    operands = _operands(3)
    result = THIS.run(traced(_flattened, *operands))
    assert result.counts == {"linears rewritten": 3, "calls": 2}
    for got, want in zip(result.graph_module(*operands), _flattened(*operands), strict=True):
        torch.testing.assert_close(got, want)


def _apart(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """With a bias and without; a weight again; one that is made in between; over other rows."""
    q, k, v, bias = others
    return (
        linear(x, q),
        linear(x, v, bias),
        linear(x, q) + 1,
        linear(x, k + 1),
        linear(-x, k),
    )


def test_what_no_call_can_share_is_apart() -> None:
    operands = _operands(3)
    result = THIS.run(traced(_apart, *operands))
    assert result.counts == {"linears rewritten": 5, "calls": 5}
    for got, want in zip(result.graph_module(*operands), _apart(*operands), strict=True):
        torch.testing.assert_close(got, want)


def _written(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _ = others
    first = linear(x, q)
    k.mul_(2)
    return first, linear(x, k), linear(x, v)


def test_a_write_between_linears_keeps_them_apart() -> None:
    """Brought together, they would read what is there before it."""
    operands = _operands(3)
    gm = traced(_three, *operands)
    one, *_ = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    k = gm.graph.find_nodes(op="placeholder")[2]
    with gm.graph.inserting_after(one):
        doubled = gm.graph.call_function(aten.mul_.Scalar, (k, 2.0))
    doubled.meta = dict(k.meta)
    gm.recompile()
    result = THIS.run(gm)
    assert result.counts == {"linears rewritten": 3, "calls": 2}
    want = _written(*(operand.clone() for operand in operands))
    got = result.graph_module(*(operand.clone() for operand in operands))
    torch.testing.assert_close(got[1], want[1])
