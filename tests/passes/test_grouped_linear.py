"""Products of tokens with their experts become calls of one operator; others stay.

Shape legend: S rows, E experts, N rows of a weight, K their size.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hand_made import aten, on_cpu, with_experts
from polar_fx.backends.specialize import graph_of, specialize
from polar_fx.passes import PASSES
from polar_fx.passes.base import Pass
from tiny_models import tiny

PASS: Pass = PASSES["grouped-linear"]()
CALL = torch.ops.polar_fx.grouped_linear.default
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def _traced(function: Callable[..., Any], *operands: Tensor) -> GraphModule:
    """A graph as backends hand it to their passes, for any number of rows."""

    class Body(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return function(*values)

    dynamic: list[dict[int, str]] = [{0: "rows"}, *({} for _ in operands[1:])]
    return graph_of(specialize(Body(), operands, dynamic=dynamic))


def _calls(gm: GraphModule) -> list[Any]:
    return [node.args[-1] for node in gm.graph.find_nodes(op="call_function", target=CALL)]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)


def _torchs(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, weight, offs=ends)


def _of_rows(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, ends: product(x, weight.transpose(-2, -1), ends)


@pytest.mark.parametrize("product", [_product, _torchs], ids=["transformers", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_rewritten(product: Callable[..., Tensor], transposed: bool) -> None:
    """By transformers' operator and by torch's, with weights [E, N, K] and [E, K, N]."""
    tiny("qwen3_moe")  # registers transformers' operator
    function = product if transposed else _of_rows(product)
    x, weight = _normal(5, 8), _normal(3, 16, 8)
    weight = weight.transpose(1, 2).contiguous() if transposed else weight
    gm = _traced(function, x.bfloat16(), weight.bfloat16(), ENDS)
    result = PASS.run(gm)
    assert result.counts == {"products rewritten": 1}
    assert _calls(result.graph_module) == [transposed]
    for more in (x, torch.cat((x, x[:3])), x[:3]):  # as traced, more rows, and fewer
        ends = (ENDS * len(more) / 5).to(torch.int32)
        got = result.graph_module(more.bfloat16(), weight.bfloat16(), ends)[0]
        of_row = torch.bucketize(torch.arange(len(more)), ends, right=True)
        each = weight[of_row] if transposed else weight[of_row].transpose(1, 2)
        want = torch.einsum("sk,skn->sn", more.double(), each.double())
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


def _of_double(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _product(x.double(), weight.double().transpose(-2, -1), ends)


def _strided(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _product(x, weight[:, ::2].transpose(-2, -1), ends)


@pytest.mark.parametrize("function", [_of_double, _strided], ids=["float64", "a weight with gaps"])
def test_other_products_stay(function: Callable[..., Tensor]) -> None:
    tiny("qwen3_moe")
    gm = _traced(function, _normal(5, 8), _normal(3, 16, 8), ENDS)
    assert any("grouped_mm" in str(node.target) for node in gm.graph.nodes)
    assert not PASS.run(gm).modified


def test_products_elsewhere_with_a_bias_or_of_another_dtype_stay() -> None:
    assert not PASS.run(with_experts()).modified, "example values on the meta device: not the CPU"
    gm = on_cpu(with_experts())
    first, second = gm.graph.find_nodes(op="call_function", target=aten._grouped_mm.default)
    first.args = (*first.args, first.args[2])
    result = PASS.run(gm)
    assert result.counts == {"products rewritten": 1} and _calls(result.graph_module) == [True]
    second.kwargs = {"out_dtype": torch.float32}
    assert not PASS.run(gm).modified


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_models_are_rewritten(family: str) -> None:
    """A layer's two products, whichever way its weights lie."""
    result = PASS.run(tiny(family).library.bodies["layer_kind_0"])
    assert _calls(result.graph_module) == [family == "gpt_oss"] * 2
