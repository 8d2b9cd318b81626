"""What regions that AOTInductor has compiled make at every call: tensors for their results, and
nothing more where sizes are known.
"""

import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from polar_fx.backends.aot_inductor import REGION, AotInductorBackend
from polar_fx.backends.base import Region

K, N = 64, 96
_TENSOR = "aoti_torch_empty_strided("


def _layer(x: Tensor, *weights: Tensor) -> Any:
    up, down = weights
    hidden = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return (x + linear(silu(linear(hidden, up)), down),)


def _base_and_view(x: Tensor, *_: Tensor) -> Any:
    made = x.sin().softmax(-1) * 2
    return made, made.view(-1)


def _view_of_a_part(x: Tensor, *_: Tensor) -> Any:
    """A part of what is put side by side, which then lies in the memory of the whole."""
    part = x.sin() * 2
    return torch.cat([part, x.relu()]).sum(0).softmax(-1), part.view(4, -1)


def _twice(x: Tensor, *_: Tensor) -> Any:
    made = x.cos().softmax(-1).exp()
    return made, made


def _in_place(x: Tensor, *_: Tensor) -> Any:
    """Each of the same size, so that the next could take the memory of the one before."""
    first = x.sin().softmax(-1)
    second = (first + x).softmax(-1)
    return second.exp() / second.sum(-1, keepdim=True), first.sum(-1)


def _kept(x: Tensor, *weights: Tensor) -> Any:
    """Among results of a library's call."""
    values, places = linear(x, weights[0]).topk(3)
    return values.exp(), places


CASES = [_layer, _base_and_view, _view_of_a_part, _twice, _in_place, _kept]


def _operands(rows: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(rows)
    shapes = (rows, 1, K), (N, K), (K, N)
    return [torch.randn(shape, generator=chance) / K**0.5 for shape in shapes]


def _region(
    function: Callable[..., Any], folder: Path, *, rows: int = 1, **options: Any
) -> tuple[Region, str]:
    """A region, and the code that calls its kernels."""

    class Body(torch.nn.Module):
        def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Any:
            return function(x, up, down)

    backend = AotInductorBackend(options)
    body: Any = Body()
    backend.export(body, _operands(rows), ({0: "batch"} if rows > 1 else {}, {}, {}), folder)
    backend.build(folder)
    with zipfile.ZipFile(folder / REGION) as package:
        (name,) = (n for n in package.namelist() if n.endswith("wrapper.cpp"))
        wrapper = package.read(name).decode()
    return backend.load({REGION: folder / REGION}), wrapper


def _assert_right(function: Callable[..., Any], region: Region, *, rows: int = 1) -> None:
    """Also of results that are looked at after the next call, and after their thread has ended."""
    first, second = _operands(rows), [-operand for operand in _operands(rows)]
    with ThreadPoolExecutor(1) as other:
        found: list[Sequence[Tensor]] = [
            other.submit(region, list(given)).result() for given in (first, second)
        ]
    found += [region(list(given)) for given in (first, second)]
    for given, results in zip((first, second) * 2, found, strict=True):
        for got, want in zip(results, function(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__.strip("_"))
def test_results_are_tensors_of_their_own(function: Callable[..., Any], tmp_path: Path) -> None:
    _assert_right(function, _region(function, tmp_path)[0])


def test_nothing_else_is_a_tensor_where_sizes_are_known(tmp_path: Path) -> None:
    assert _region(_layer, tmp_path)[1].count(_TENSOR) == 1


def test_more_are_where_sizes_vary_or_a_user_says_so(tmp_path: Path) -> None:
    region, wrapper = _region(_layer, tmp_path, rows=3)
    assert wrapper.count(_TENSOR) > 1
    _assert_right(_layer, region, rows=3)
    _assert_right(_layer, region, rows=70)
    (tmp_path / "asked").mkdir()
    asked = {"aot_inductor.allow_stack_allocation": False}
    region, wrapper = _region(_layer, tmp_path / "asked", **asked)
    assert wrapper.count(_TENSOR) > 1
    _assert_right(_layer, region)
