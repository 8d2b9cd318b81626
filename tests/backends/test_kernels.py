"""Kernels of ours beside each other: one region may call all of them."""

from typing import Any

import torch
from torch import Tensor

from polar_fx.backends import AotInductorBackend
from polar_fx.backends.kernels import _KNOWN
from polar_fx.passes.attention_over_blocks import block_attention
from polar_fx.passes.grouped_linear import grouped_linear
from polar_fx.passes.linear_to_row_kernel import row_linear
from polar_fx.passes.quantized_linear import quantized_linear

CALLED = (block_attention, grouped_linear, row_linear, quantized_linear)


class _Body(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, *others: Tensor) -> Any:
        integers, scale, experts, ends, store, blocks = others
        y = row_linear(x, [weight], [])
        y = y + quantized_linear(y, [integers], [scale], [], [])
        y = y + grouped_linear(y.view(3, -1), experts, ends, False).view(y.shape)
        query = y.view(3, 1, 4, -1)
        return y, block_attention(query, store, store.neg(), blocks, None, 0.25)


def test_one_region_calls_all_of_them() -> None:
    """Their C++ is in one file then: nothing is defined twice."""
    own = {target for target, (_, text) in _KNOWN.items() if text is not None}
    assert own == {each._opoverload for each in CALLED}, "those of this test are all there are"
    torch.manual_seed(0)
    operands = [
        torch.randn(3, 1, 32),
        torch.randn(64, 32) / 6,
        torch.randint(-99, 99, (64, 64), dtype=torch.int8),
        torch.rand(64, 1) / 99,
        torch.randn(2, 64, 64) / 8,
        torch.tensor([1, 3], dtype=torch.int32),
        torch.randn(5, 2, 16, 16),
        torch.tensor([[1, 2], [3, 4], [2, 0]]),
    ]
    body: Any = _Body()
    region = AotInductorBackend().compile_region(body, operands, [{} for _ in operands])
    for got, want in zip(region(list(operands)), _Body()(*operands), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
