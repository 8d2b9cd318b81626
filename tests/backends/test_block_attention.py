"""The kernel for attention over blocks: what it computes for several tokens a row and for one, with
the processor's instructions and with older ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from over_blocks import DYNAMIC, attention, operands
from polar_fx.backends import AotInductorBackend, block_attention
from polar_fx.backends.base import Region
from polar_fx.passes.attention_over_blocks import AttentionOverBlocks

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
# Of each region's attentions: a plain one; odd sizes, and a mask that is added; columns that no
# vector divides, and a scale below zero; many heads on one, and one mask for all rows
KINDS: tuple[dict[str, Any], ...] = (
    {"size": 64},
    {"heads": 1, "groups": 4, "size": 18, "value_size": 34, "added": True},
    {"groups": 1, "block": 6, "mask": False},
    {"heads": 1, "groups": 17, "mask_heads": True, "mask_rows": False},
)
SCALES = (0.3, 0.3, -0.3, 0.0)
# one tile; several, the last of them short; more columns than a tile has, and than a thread's part
SHAPES = (
    {"rows": 2, "tokens": 5, "blocks": 2},
    {"rows": 3, "tokens": 97, "blocks": 5},
    {"rows": 1, "tokens": 33, "blocks": 40},
)


class _Body(torch.nn.Module):
    """Each attention of several tokens a row, and then of one."""

    def forward(self, *given: Tensor) -> Any:
        results, left = [], list(given)
        for kind, scale in (*zip(KINDS, SCALES, strict=True),) * 2:
            count = 5 if kind.get("mask", True) else 4
            results.append(attention(left[:count], scale=scale))
            left = left[count:]
        return tuple(results)


def _operands(dtype: torch.dtype, shape: dict[str, int]) -> list[Tensor]:
    shapes = shape, {**shape, "tokens": 1}
    return [p for s in shapes for kind in KINDS for p in operands(**s, **kind, dtype=dtype)]


def _dynamic() -> list[dict[int, str]]:
    """The axes that may vary: what has one token has no other number, what all rows share has one
    row, and the stores of each attention are its own.
    """
    found: list[dict[int, str]] = []
    for number, kind in enumerate((*KINDS, *KINDS)):
        for axes in DYNAMIC if kind.get("mask", True) else DYNAMIC[:4]:
            own = {a: name.replace("stored", f"stored{number}") for a, name in axes.items()}
            fixed = {"tokens"} if number >= len(KINDS) else set[str]()
            if axes is DYNAMIC[4] and not kind.get("mask_rows", True):
                fixed.add("batch")
            found.append({axis: name for axis, name in own.items() if name not in fixed})
    return found


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """A long row is then divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    scope="module",
    params=[
        (torch.float32, None),
        (torch.bfloat16, None),
        pytest.param((torch.float32, 256), marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16", "float32, AVX2"],
)
def region(request: pytest.FixtureRequest, two_threads: None) -> tuple[Region, torch.dtype]:
    """For any numbers of rows, tokens and blocks: compiling takes seconds."""
    dtype, lanes = request.param
    if dtype == torch.bfloat16 and not block_attention.is_faster():
        pytest.skip("oneDNN multiplies bfloat16 on processors with AVX-512")
    options = {} if lanes is None else {"cpp.simdlen": lanes}
    backend = AotInductorBackend(options, passes=(AttentionOverBlocks(),))
    body: Any = _Body()
    return backend.compile_region(body, _operands(dtype, SHAPES[0]), _dynamic()), dtype


def _assert_near(got: Sequence[Tensor], given: Sequence[Tensor], *, near: float) -> None:
    exact = _Body()(*(o.double() if o.is_floating_point() else o for o in given))
    for mine, want in zip(got, exact, strict=True):
        assert mine.shape == want.shape
        torch.testing.assert_close(mine.double(), want, rtol=near, atol=near)


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s.values())))
def test_it_attends(shape: dict[str, int], region: tuple[Region, torch.dtype]) -> None:
    run, dtype = region
    given = _operands(dtype, shape)
    _assert_near(run(list(given)), given, near=1e-5 if dtype == torch.float32 else 0.03)


@needs_onednn
def test_a_token_that_sees_nothing_gets_zeros(region: tuple[Region, torch.dtype]) -> None:
    """As of torch's kernel: padding has such tokens."""
    run, dtype = region
    given = _operands(dtype, SHAPES[1])
    several, one = given[4], given[4 + len(given) // 2]
    several[1, :, 90:], one[1] = False, False
    got, half = run(list(given)), len(KINDS)
    assert not got[0][1, :, 90:].any() and got[0][1, :, :90].all()
    assert not got[half][1].any() and got[half][0].all()
    for mine, before in zip(got, run(_operands(dtype, SHAPES[1])), strict=True):
        assert torch.equal(mine[0], before[0]), "other rows stay"


@needs_onednn
def test_what_nobody_sees_counts_for_nothing(region: tuple[Region, torch.dtype]) -> None:
    """Columns past the last token of all may hold anything finite, such as zeros."""
    run, dtype = region
    given = _operands(dtype, SHAPES[2])
    half = len(given) // 2
    for i in (0, half):
        given[i + 4][..., 300:] = False
    before = [r.clone() for r in run(list(given))]
    for i in (0, half):
        for store in given[i + 1 : i + 3]:
            store[given[i + 3][:, 19:]] = 7.0
    assert all(map(torch.equal, run(list(given)), before))


@needs_onednn
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 320], ids=["the first column", "one of the second tile"])
def test_scores_that_are_no_numbers_make_none(
    column: int, value: float, region: tuple[Region, torch.dtype]
) -> None:
    run, dtype = region
    given = _operands(dtype, SHAPES[2])
    half = len(given) // 2
    for i in (0, half):
        given[i][:] = given[i].abs() + 0.1  # infinity in a key is infinity in scores
        given[i + 1][given[i + 3][0, column // 16], :, column % 16] = value
        given[i + 4][:] = True
    got = run(list(given))
    assert got[0].isnan().all() and got[len(KINDS)].isnan().all()


@needs_onednn
@pytest.mark.parametrize("column", [0, 320], ids=["the first column", "one of the second tile"])
def test_a_score_of_minus_infinity_is_not_seen(
    column: int, region: tuple[Region, torch.dtype]
) -> None:
    run, dtype = region
    given, hidden = _operands(dtype, SHAPES[2]), _operands(dtype, SHAPES[2])
    half = len(given) // 2
    for i in (0, half):
        for each in (given, hidden):
            each[i][:] = each[i].abs() + 0.1
            each[i + 4][:] = True
        given[i + 1][given[i + 3][0, column // 16], :, column % 16] = -float("inf")
        hidden[i + 4][0, ..., column] = False
    got, want = run(list(given)), run(list(hidden))
    near = 1e-5 if dtype == torch.float32 else 0.03
    for i in (0, len(KINDS)):
        torch.testing.assert_close(got[i][0], want[i][0], rtol=near, atol=near)


@needs_onednn
def test_operands_may_begin_anywhere_in_memory(two_threads: None) -> None:
    """One row's query as a part of what one product makes."""

    class Body(torch.nn.Module):
        def forward(self, fused: Tensor, *others: Tensor) -> tuple[Tensor]:
            return (attention([(fused * 2)[:, :, 3:], *others]),)

    query, *others = operands(rows=1, tokens=1)
    fused = torch.cat([torch.ones(1, 1, 3, 16), query], 2)
    body, dynamic = Body(), [{}] * 5
    run = AotInductorBackend(passes=(AttentionOverBlocks(),)).compile_region(
        body,  # type: ignore[arg-type]
        [fused, *others],
        dynamic,
    )
    torch.testing.assert_close(run([fused, *others])[0], body(fused, *others)[0])


@pytest.mark.parametrize(
    ("capability", "onednn", "expected"),
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)],
)
def test_which_processors_it_is_for(
    capability: str, onednn: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: onednn)
    assert block_attention.is_faster() is expected
