"""The weights file of a bundle: every tensor once, and back in memory as the code reads it."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polar_fx.bundle import BundleError, Manifest
from polar_fx.bundle.contents import load_weights, stored_weights
from polar_fx.symbols import BodySymbols, Operand, Symbol, SymbolTable


def _table(weights: dict[str, Tensor]) -> SymbolTable:
    """A table whose prologue takes these tensors as they are laid out."""
    operands = [
        Operand("weight", str(t.dtype).removeprefix("torch."), tuple(map(str, t.shape)), tuple(map(str, t.stride())))
        for t in weights.values()
    ]
    body = BodySymbols("0" * 64, tuple(operands))
    return SymbolTable({"prologue": body}, Symbol("prologue", (), tuple(weights)), (), Symbol("prologue", (), tuple(weights)), ())


def test_tensors_are_written_once_and_come_back_as_they_were_laid_out(tmp_path: Path) -> None:
    whole = torch.arange(48.0).reshape(6, 8)
    tensors = {
        "whole": whole, "tied": whole.view(6, 8), "transposed": whole.mT, "slice": whole[2:4], "one": torch.tensor(3.0),
        "empty": torch.empty(0, 4), "bytes": torch.arange(5, dtype=torch.uint8), "half": whole.bfloat16(),
    }  # fmt: skip
    table = _table(tensors)
    written, ties = stored_weights(tensors, table)
    assert ties == {"tied": "whole"} and "tied" not in written
    save_file(written, tmp_path / "weights.safetensors")
    loaded = load_weights(tmp_path, cast(Manifest, SimpleNamespace(ties=ties)), table)
    assert loaded["tied"] is loaded["whole"]
    for name, tensor in tensors.items():
        assert (
            torch.equal(loaded[name], tensor) and loaded[name].stride() == tensor.stride() and loaded[name].dtype == tensor.dtype
        )


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.zeros(3, 4)[:, :2], "gaps or overlap"), (torch.zeros(1).expand(3), "gaps or overlap"),
     (torch.zeros(2, dtype=torch.complex64), "safetensors has no complex64")],
)  # fmt: skip
def test_tensors_that_cannot_be_written_are_refused(tensor: Tensor, words: str) -> None:
    with pytest.raises(BundleError, match=rf"cannot hold odd: .*{words}"):
        stored_weights({"odd": tensor}, _table({"odd": tensor}))


def test_a_tensor_laid_out_otherwise_than_the_code_reads_it_is_refused() -> None:
    table = _table({"odd": torch.zeros(2, 3)})
    for other in (torch.zeros(3, 2).mT, torch.zeros(2, 4), torch.zeros(2, 3).double()):
        with pytest.raises(BundleError, match="cannot hold odd: it is not laid out as the code"):
            stored_weights({"odd": other}, table)
