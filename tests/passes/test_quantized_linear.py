"""Linears over integer weights: what becomes of them, and which stay.

Shape legend: N rows of a weight, K their size.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from hand_made import on_cpu, over_integers
from polar_fx.backends.specialize import graph_of, specialize
from polar_fx.passes.quantized_linear import QuantizedLinear, dequantize
from polar_fx.quantized import integers_of


class _Linear(torch.nn.Module):
    def forward(self, x: Tensor, *parts: Tensor) -> tuple[Tensor]:
        return (linear(x, dequantize(*parts)),)


@pytest.mark.parametrize("way", ["int8", "int4"])
def test_what_dequantize_traces_becomes_one_operator_for_any_rows(way: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    parts = integers_of(x[0, :, :].repeat(4, 1), way)
    dynamic = [{0: "batch", 1: "tokens"}, *({} for _ in parts)]
    gm = graph_of(specialize(_Linear(), [x, *parts], dynamic=dynamic))
    result = QuantizedLinear().run(gm)
    called = [str(n.target) for n in result.graph_module.graph.nodes if n.op == "call_function"]
    noted = "aten._assert_tensor_metadata.default"  # by torch.export, of an operand
    assert [name for name in called if name != noted] == ["polar_fx.quantized_linear.default"]
    more = torch.cat([x, x])
    assert torch.equal(result.graph_module(more, *parts)[0], linear(more, dequantize(*parts)))


class _Three(torch.nn.Module):
    """Two linears over x, and one over what the first of them gives."""

    def forward(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        size = len(parts) // 3
        first, second, third = (parts[i * size : (i + 1) * size] for i in range(3))
        a, b = linear(x, dequantize(*first)), linear(x, dequantize(*second))
        return a, b, linear(a, dequantize(*third))


@pytest.mark.parametrize("way", ["int8", "int4"])
def test_linears_over_the_same_become_one_call(way: str) -> None:
    torch.manual_seed(0)
    x, sizes = torch.randn(3, 1, 64), ((32, 64), (5, 64), (7, 32))
    parts = [part for size in sizes for part in integers_of(torch.randn(size), way)]
    operands = [x, *parts]
    gm = graph_of(specialize(_Three(), operands, dynamic=[{}] * len(operands)))
    result = QuantizedLinear().run(gm)
    assert result.counts == {"linears rewritten": 3, "calls": 2}
    for got, want in zip(result.graph_module(x, *parts), _Three()(x, *parts), strict=True):
        torch.testing.assert_close(got, want)


def test_a_part_of_a_call_may_be_folded_and_a_weight_is_read_once_in_it() -> None:
    """Rows of a part have gaps between them; a kernel names each of its operands once."""

    class Body(torch.nn.Module):
        def forward(self, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            first, second = parts[:2], parts[2:]
            a, b = linear(x, dequantize(*first)), linear(x, dequantize(*second))
            return a.view(-1, 4), b, linear(x, dequantize(*first)) + 1

    torch.manual_seed(0)
    x = torch.randn(3, 2, 64)
    parts = [part for n in (8, 6) for part in integers_of(torch.randn(n, 64), "int8")]
    operands = [x, *parts]
    result = QuantizedLinear().run(graph_of(specialize(Body(), operands, dynamic=[{}] * 5)))
    assert result.counts == {"linears rewritten": 3, "calls": 2}
    for got, want in zip(result.graph_module(*operands), Body()(*operands), strict=True):
        torch.testing.assert_close(got, want)


def test_linears_elsewhere_or_of_other_dtypes_stay() -> None:
    assert not QuantizedLinear().run(over_integers()).modified, "on meta, not the CPU"
    assert not QuantizedLinear().run(on_cpu(over_integers(torch.float16))).modified
