"""The kernel for linears over rows and tokens: what it computes, with the processor's instructions
and with older ones, by loops, by tiles and by the library.

Shape legend: B rows, T tokens of each, K their size, N rows of a weight.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from polar_fx.backends import AotInductorBackend
from polar_fx.backends.base import Region
from polar_fx.passes.linear_to_row_kernel import row_linear

# K and N of weights, and whether there is a bias: whole vectors, less than one, and some over
SIZES = ((64, 34, False), (34, 5, True), (5, 67, False), (67, 64, True))
DTYPES = (torch.float32, torch.bfloat16)
# none, up to a block of rows, past it, several blocks, tiles that are whole and that are not, and
# so many that the library multiplies
ROWS = (0, 2, 3, 5, 7, 8, 9, 16, 23, 32, 64, 70, 81, 130)
# rows and tokens
SHAPES = ((2, 2), (2, 9), (3, 11), (8, 16))


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _weights(dtype: torch.dtype) -> list[Tensor]:
    made: list[Tensor] = []
    for i, (k, n, with_bias) in enumerate(SIZES):
        made.append(_normal(n, k, seed=i) / k**0.5)
        if with_bias:
            made.append(_normal(n, seed=10 + i))
    return [w.to(dtype) for w in made]


def _linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Each linear of what the one before gave, with something in between that may be fused."""
    left, results = list(weights), []
    for _, _, with_bias in SIZES:
        results.append(linear(x, left.pop(0), left.pop(0) if with_bias else None))
        x = silu(results[-1])
    return results


class _Body(torch.nn.Module):
    def forward(self, *operands: Tensor) -> Any:
        half = len(operands) // 2
        return (
            *_linears(operands[0], operands[1:half]),
            *_linears(operands[half], operands[half + 1 :]),
        )


def _operands(rows: int, tokens: int = 1) -> list[Tensor]:
    x = _normal(rows, tokens, SIZES[0][0], seed=rows)
    return [part for dtype in DTYPES for part in (x.to(dtype), *_weights(dtype))]


def _compiled(
    example: Sequence[Tensor], axes: dict[int, str], *, options: dict[str, Any]
) -> Region:
    """Both dtypes in one region: compiling takes seconds."""
    dynamic = [axes if operand.dim() == 3 else {} for operand in example]
    body: Any = _Body()
    return AotInductorBackend(options).compile_region(body, example, dynamic)


@pytest.fixture(scope="module", params=[None, 256], ids=["this processor", "AVX2"])
def region(request: pytest.FixtureRequest) -> Region:
    """For one token of any number of rows."""
    options = {} if request.param is None else {"cpp.simdlen": request.param}
    return _compiled(_operands(3), {0: "batch"}, options=options)


@pytest.fixture(scope="module")
def region_of_tokens() -> Region:
    """For any number of rows and tokens."""
    return _compiled(_operands(3, 2), {0: "batch", 1: "tokens"}, options={})


def _assert_near(
    operands: Sequence[Tensor], region: Callable[[list[Tensor]], Sequence[Tensor]]
) -> None:
    got, want = region(list(operands)), _Body()(*(o.double() for o in operands))
    for mine, exact in zip(got, want, strict=True):
        assert mine.shape == exact.shape
        near = 1e-5 if mine.dtype == torch.float32 else 0.05
        torch.testing.assert_close(mine.double(), exact, rtol=near, atol=near)


@pytest.mark.parametrize("rows", ROWS)
def test_it_multiplies_any_number_of_rows(rows: int, region: Region) -> None:
    _assert_near(_operands(rows), region)


def test_it_multiplies_one_row() -> None:
    _assert_near(_operands(1), _compiled(_operands(1), {}, options={}))


# N of weights over the same rows: an odd number, less than are multiplied at a time, and a cut
# through what a thread has
TOGETHER = (35, 1, 130, 2)


class _Together(torch.nn.Module):
    """Weights and biases lie in one memory each, one after the other, from the second row on."""

    def forward(self, x: Tensor, *together: Tensor) -> Any:
        weights, biases = (each[1:].split(TOGETHER) for each in together)
        return row_linear(x, weights, []), row_linear(x, weights, biases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_over_the_same_rows_are_multiplied_together(rows: int, dtype: torch.dtype) -> None:
    """In loops, by tiles, and by the library; with this processor's instructions, and of one row
    with AVX2 too.
    """
    size = 1 + sum(TOGETHER)
    others = [_normal(size, 70, seed=1).div(8).to(dtype), _normal(size, seed=2).to(dtype)]
    body: Any = _Together()
    example = [_normal(rows, 1, 70, seed=0).to(dtype), *others]
    axes = {0: "batch"} if rows > 1 else {}
    for options in ({}, {"cpp.simdlen": 256}) if rows == 1 else ({},):
        region = AotInductorBackend(options).compile_region(body, example, [axes, {}, {}])
        for count in (rows,) if rows == 1 else (3, 40, 150):
            x = _normal(count, 1, 70, seed=count).to(dtype)
            want = body(x.double(), *map(Tensor.double, others))
            near = 1e-5 if dtype == torch.float32 else 0.05
            for mine, exact in zip(region([x, *others]), want, strict=True):
                torch.testing.assert_close(mine.double(), exact, rtol=near, atol=near)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_multiplies_any_number_of_tokens(
    shape: tuple[int, int], region_of_tokens: Region
) -> None:
    _assert_near(_operands(*shape), region_of_tokens)


def test_it_multiplies_where_onednn_is_switched_off(region: Region) -> None:
    """Tiles are oneDNN's: the others are left."""
    with torch.backends.mkldnn.flags(enabled=False):
        _assert_near(_operands(32), region)


def test_a_row_has_the_same_bits_beside_any_others(region: Region) -> None:
    """In fp32: the kernel sums each row in the same order."""
    many, few = _operands(16), _operands(16)
    few[0], few[len(few) // 2] = few[0][6:9], few[len(few) // 2][6:9]
    for of_many, of_few in zip(region(many)[:4], region(few)[:4], strict=True):
        assert torch.equal(of_many[6:9], of_few)
