"""The kernel for products of tokens with their experts: what it computes, with the processor's
instructions and with older ones, whatever the experts have.

Shape legend: S rows, E experts, N rows of a weight, K their size.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from polar_fx.backends import AotInductorBackend
from polar_fx.backends.base import Region
from polar_fx.passes.grouped_linear import grouped_linear

E = 4
# K and N of weights, and whether they are [E, K, N]: whole vectors, less than one, and some over
SIZES = ((64, 34, False), (34, 65, True), (65, 132, False), (132, 64, True))
# Rows of each expert: one, some and none; blocks of rows and some over; so many of one that the
# library multiplies; none at all. A last number is of rows that no expert has.
ROWS = {
    "one each": (1, 1, 1, 1, 0),
    "few of some": (0, 3, 0, 2, 0),
    "blocks and some over": (9, 0, 23, 6, 0),
    "many of one": (1, 80, 0, 2, 0),
    "none has the last": (2, 1, 0, 0, 3),
    "nobody has any": (0, 0, 0, 0, 5),
}


def _operands(rows: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    chance = torch.Generator().manual_seed(sum(rows))
    made = [torch.randn(sum(rows), SIZES[0][0], generator=chance).to(dtype)]
    kind = torch.int64 if dtype == torch.float32 else torch.int32  # either may count rows
    made.append(torch.tensor(rows[:E]).cumsum(0).to(kind))
    for k, n, transposed in SIZES:
        shape = (E, k, n) if transposed else (E, n, k)
        made.append((torch.randn(shape, generator=chance) / k**0.5).to(dtype))
    return made


class _Body(torch.nn.Module):
    """Each product of what the one before gave, with something in between that may be fused."""

    def forward(self, x: Tensor, ends: Tensor, *weights: Tensor) -> Any:
        results = []
        for weight, (_, _, transposed) in zip(weights, SIZES, strict=True):
            results.append(grouped_linear(x, weight, ends, transposed))
            x = silu(results[-1])
        return tuple(results)


def _looped(x: Tensor, ends: Tensor, *weights: Tensor) -> list[Tensor]:
    """The same, row by row."""
    results = []
    for weight, (_, n, transposed) in zip(weights, SIZES, strict=True):
        rows = []
        for s, row in enumerate(x):
            expert = int((ends <= s).sum())
            own = weight[expert] if expert < E else None
            nothing = x.new_zeros(n)
            rows.append(nothing if own is None else row @ (own if transposed else own.t()))
        results.append(torch.stack(rows))
        x = silu(results[-1])
    return results


# Compiling takes seconds, so each processor has one of the dtypes.
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "this processor, bf16": (torch.bfloat16, {}),
    "this processor, fp32": (torch.float32, {}),
    "AVX2, fp32": (torch.float32, {"cpp.simdlen": 256}),
    "AVX2, bf16": (torch.bfloat16, {"cpp.simdlen": 256}),
}


@pytest.fixture(scope="module", params=CASES)
def region(request: pytest.FixtureRequest) -> tuple[torch.dtype, Region]:
    """A dtype, and a region of it for any number of rows."""
    dtype, options = CASES[request.param]
    example = _operands((2, 1, 0, 0, 0), dtype)
    dynamic: list[dict[int, str]] = [{0: "rows"}, *({} for _ in example[1:])]
    body: Any = _Body()
    return dtype, AotInductorBackend(options).compile_region(body, example, dynamic)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_meet_their_own_expert(
    rows: tuple[int, ...], region: tuple[torch.dtype, Region]
) -> None:
    dtype, run = region
    operands = _operands(rows, dtype)
    exact = [o.double() if o.is_floating_point() else o for o in operands]
    for mine, want in zip(run(list(operands)), _looped(*exact), strict=True):
        assert mine.dtype == dtype and mine.shape == want.shape
        near = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(mine.double(), want, rtol=near, atol=near)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_operator_itself_is_a_loop_over_experts(rows: tuple[int, ...]) -> None:
    operands = [o.double() if o.is_floating_point() else o for o in _operands(rows, torch.float32)]
    for mine, want in zip(_Body()(*operands), _looped(*operands), strict=True):
        torch.testing.assert_close(mine, want)
