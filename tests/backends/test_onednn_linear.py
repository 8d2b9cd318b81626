"""The call of oneDNN that regions make for float32 linears, and when they make it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from polar_fx.backends import AotInductorBackend, InductorBackend, onednn_linear
from polar_fx.backends.base import Backend
from polar_fx.passes.linear_to_onednn import LinearToOneDnn

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


class _Layers(torch.nn.Module):
    """Two linears, the second with a bias, with tokens and rows of any number."""

    def forward(self, x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (linear(linear(x, first).relu(), second, bias),)


@needs_onednn
@pytest.mark.parametrize("kind", [InductorBackend, AotInductorBackend])
def test_a_region_multiplies_by_onednn(kind: type[Backend]) -> None:
    """For numbers of rows and tokens other than those it was compiled with."""
    torch.manual_seed(0)
    weights = torch.randn(24, 16), torch.randn(16, 24), torch.randn(16)
    example = (torch.randn(2, 6, 16), *weights)
    dynamic = ({0: "B", 1: "T"}, {}, {}, {})
    body = torch.fx.symbolic_trace(_Layers())
    region = kind(passes=(LinearToOneDnn(),)).compile_region(body, example, dynamic)
    for shape in ((2, 6, 16), (3, 11, 16)):
        x = torch.randn(shape)
        (got,) = region([x, *weights])
        torch.testing.assert_close(got, _Layers()(x, *weights)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("maker", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)]
)
def test_which_processors_it_is_for(
    maker: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = "processor\t: 0\n" + (f"vendor_id\t: {maker}\n" if maker else "")
    (tmp_path / "cpuinfo").write_text(described, encoding="utf-8")
    monkeypatch.setattr("polar_fx.environment._PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    assert onednn_linear.is_faster.__wrapped__() is expected


@pytest.mark.parametrize("missing", ["mkl", "mkldnn", "processor", "x86", "AVX-512"])
def test_it_is_not_for_other_builds_and_machines(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("vendor_id : AuthenticAMD\n", encoding="utf-8")
    there = "nothing" if missing == "processor" else "cpuinfo"
    monkeypatch.setattr("polar_fx.environment._PROCESSOR", tmp_path / there)
    machine = "aarch64" if missing == "x86" else "x86_64"
    monkeypatch.setattr("platform.machine", lambda: machine)
    capability = "AVX2" if missing == "AVX-512" else "AVX512"
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for library in ("mkl", "mkldnn"):
        found = missing != library
        monkeypatch.setattr(f"torch.backends.{library}.is_available", lambda found=found: found)
    assert not onednn_linear.is_faster.__wrapped__()
