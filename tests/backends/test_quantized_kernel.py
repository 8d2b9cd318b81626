"""The kernel for linears whose weights are integers: what it computes, with the processor's
instructions and with older ones, for few rows and for many.

Shape legend: B rows, K their size, N rows of a weight.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from polar_fx.backends import AotInductorBackend
from polar_fx.backends.base import Region
from polar_fx.passes.quantized_linear import dequantize
from polar_fx.quantized import integers_of

# K and N of weights, how they are held, and whether there is a bias: whole blocks, parts of one
# over, and less than one
SIZES = (
    (64, 96, "int4", False),
    (96, 160, "int4", True),
    (160, 35, "int4", False),
    (35, 99, "int8", True),
    (99, 64, "int8", False),
)
BESIDE = (64, 37, "int4", False)  # over what the first of them is over: one call makes both
# none, up to a block of rows, past it, several blocks, tiles that are whole and that are not, and
# so many that the library multiplies
ROWS = (0, 2, 3, 8, 13, 23, 64, 70, 390)


def _operands(rows: int, dtype: torch.dtype) -> list[Tensor]:
    chance = torch.Generator().manual_seed(rows)
    made = [torch.randn(rows, 1, SIZES[0][0], generator=chance).to(dtype)]
    for k, n, way, with_bias in (*SIZES, BESIDE):
        weight = torch.randn(n, k, generator=chance) / k**0.5
        made += integers_of(weight.to(dtype), way)
        if with_bias:
            made.append(torch.randn(n, generator=chance).to(dtype))
    return made


class _Body(torch.nn.Module):
    """Each linear of what the one before gave, with something in between that may be fused."""

    def forward(self, *operands: Tensor) -> Any:
        x, *left = operands
        results = []
        for _, _, way, with_bias in SIZES:
            parts = [left.pop(0) for _ in range(3 if way == "int4" else 2)]
            results.append(linear(x, dequantize(*parts), left.pop(0) if with_bias else None))
            x = silu(results[-1])
        return (*results, linear(operands[0], dequantize(*left)))


# Compiling takes seconds, so an older processor has one of the dtypes.
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "this processor, bf16": (torch.bfloat16, {}),
    "this processor, fp32": (torch.float32, {}),
    "AVX2, fp32": (torch.float32, {"cpp.simdlen": 256}),
}


@pytest.fixture(scope="module", params=CASES)
def region(request: pytest.FixtureRequest) -> tuple[torch.dtype, Region]:
    """A dtype, and a region of it for any number of rows."""
    dtype, options = CASES[request.param]
    example = _operands(3, dtype)
    dynamic = [{0: "batch"} if operand.shape[:2] == (3, 1) else {} for operand in example]
    body: Any = _Body()
    return dtype, AotInductorBackend(options).compile_region(body, example, dynamic)


@pytest.mark.parametrize("rows", ROWS)
def test_it_multiplies_any_number_of_rows(rows: int, region: tuple[torch.dtype, Region]) -> None:
    dtype, run = region
    operands = _operands(rows, dtype)
    exact = [o.double() if o.is_floating_point() else o for o in operands]
    for mine, want in zip(run(list(operands)), _Body()(*exact), strict=True):
        assert mine.shape == want.shape
        near = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(mine.double(), want, rtol=near, atol=near)


# few rows of floats are scaled block by block, more by the weight
@pytest.mark.parametrize("region", ["this processor, bf16"], indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_a_row_has_the_same_results_beside_any_others(
    rows: int, region: tuple[torch.dtype, Region]
) -> None:
    dtype, run = region
    operands = _operands(13, dtype)
    of_some = [o[:rows] if o.shape[:2] == (13, 1) else o for o in operands]
    for some, many in zip(run(of_some), run(operands), strict=True):
        assert torch.equal(some, many[:rows])
