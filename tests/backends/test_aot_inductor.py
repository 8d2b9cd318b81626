"""What regions that AOTInductor has compiled need at every call."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from polar_fx.backends.aot_inductor import REGION, AotInductorBackend

K, N = 64, 96


class _Body(torch.nn.Module):
    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x + linear(silu(linear(hidden, up)), down)


def _operands(rows: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(rows)
    shapes = (rows, 1, K), (N, K), (K, N)
    return [torch.randn(shape, generator=chance) / K**0.5 for shape in shapes]


@pytest.mark.parametrize("rows", [1, 3], ids=["one row", "any number of rows"])
def test_what_lies_between_kernels_is_on_the_stack_if_its_size_is_known(
    rows: int, tmp_path: Path
) -> None:
    backend = AotInductorBackend()
    body = torch.fx.symbolic_trace(_Body())
    backend.export(body, _operands(rows), ({} if rows == 1 else {0: "batch"}, {}, {}), tmp_path)
    backend.build(tmp_path)
    with zipfile.ZipFile(tmp_path / REGION) as package:
        (name,) = (n for n in package.namelist() if n.endswith("wrapper.cpp"))
        wrapper = package.read(name).decode()
    tensors = wrapper.count("aoti_torch_empty_strided(")
    assert tensors == 1 if rows == 1 else tensors > 1, "the result is a tensor of its own"
    region = backend.load({REGION: tmp_path / REGION})
    for count in {rows, 1 if rows == 1 else 70}:
        first, second = _operands(count), [-operand for operand in _operands(count)]
        (got,), (other,) = region(list(first)), region(list(second))
        torch.testing.assert_close(got, _Body()(*first), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, _Body()(*second), rtol=1e-5, atol=1e-5)
