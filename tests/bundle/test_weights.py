"""The weights file of a bundle: every tensor once, and back in memory as the code reads it."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polar_fx.bundle import BundleError, Manifest
from polar_fx.bundle.files import Reader
from polar_fx.bundle.manifest import WEIGHTS, BundledFile
from polar_fx.bundle.weights import check_weights, load_weights, stored_weights
from polar_fx.library.symbols import BodySymbols, Operand, Symbol, SymbolTable


def _table(weights: dict[str, Tensor]) -> SymbolTable:
    """A table whose prologue takes these tensors as they are laid out."""
    operands = [
        Operand(
            "weight",
            str(t.dtype).removeprefix("torch."),
            tuple(map(str, t.shape)),
            tuple(map(str, t.stride())),
        )
        for t in weights.values()
    ]
    body = BodySymbols("0" * 64, tuple(operands))
    return SymbolTable(
        {"prologue": body},
        Symbol("prologue", (), tuple(weights)),
        (),
        Symbol("prologue", (), tuple(weights)),
        (),
    )


def _manifest(
    content: bytes, ties: dict[str, str] | None = None, *, num_bytes: int | None = None
) -> Manifest:
    """One that vouches for a weights file of that content."""
    file = BundledFile(WEIGHTS, num_bytes or len(content), hashlib.sha256(content).hexdigest())
    return cast(
        Manifest,
        SimpleNamespace(ties=ties or {}, dtype="float32", vocab_size=0, file=lambda path: file),
    )


def test_tensors_are_written_once_and_come_back_as_they_were_laid_out(tmp_path: Path) -> None:
    whole = torch.arange(48.0).reshape(6, 8)
    tensors = {
        "whole": whole,
        "tied": whole.view(6, 8),
        "transposed": whole.mT,
        "slice": whole[2:4],
        "one": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": whole.bfloat16(),
    }
    table = _table(tensors)
    written, ties = stored_weights(tensors, table)
    assert ties == {"tied": "whole"} and "tied" not in written
    save_file(written, tmp_path / "weights.safetensors")
    loaded = load_weights(
        tmp_path, _manifest((tmp_path / "weights.safetensors").read_bytes(), ties), table=table
    )
    assert loaded["tied"] is loaded["whole"]
    for name, tensor in tensors.items():
        assert (
            torch.equal(loaded[name], tensor)
            and loaded[name].stride() == tensor.stride()
            and loaded[name].dtype == tensor.dtype
        )


def _file(header: object, data: bytes = bytes(24)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(*offsets: Any, shape: Any = (2, 3), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "nothing": (b"", "is no safetensors file: its header cannot be 0 bytes long"),
    "a length and no more": (bytes(8), "its header cannot be 0 bytes long"),
    "a header beyond the end": (
        (10**18).to_bytes(8, "little") + bytes(99),
        "its header cannot be 1,000,000,000,000,000,000 bytes",
    ),
    "no JSON": (_file(b"{]"), "is not valid JSON"),
    "a name twice": (_file(b'{"w": 1, "w": 2}'), "'w' is there twice"),
    "a list": (_file([]), "its header is no JSON object"),
    "a tensor that is a number": (_file({"w": 3}), "tensor 'w' must be an object"),
    "a field too many": (
        _file({"w": {**_entry(0, 24), "code": ""}}),
        r"tensor 'w'\.code is not a field",
    ),
    "a dtype of nobody": (
        _file({"w": _entry(0, 24, dtype="F99")}),
        "dtype is 'F99', and the code takes none of that",
    ),
    "a size below zero": (_file({"w": _entry(0, 24, shape=(-2, -3))}), "must hold whole numbers"),
    "a size of text": (_file({"w": _entry(0, 24, shape=("2", 3))}), "must hold whole numbers"),
    "one offset": (_file({"w": _entry(0)}), "data_offsets has 1 entries"),
    "a tensor beyond the end": (
        _file({"w": _entry(0, 48, shape=(4, 3))}),
        "its tensors take 48 bytes, and it has 24",
    ),
    "bytes of no tensor": (
        _file({"w": _entry(0, 24)}, bytes(25)),
        "its tensors take 24 bytes, and it has 25",
    ),
    "a gap": (
        _file({"w": _entry(4, 28)}, bytes(28)),
        "tensor 'w' does not lie where the one before it ends",
    ),
    "an overlap": (
        _file({"w": _entry(0, 24), "v": _entry(0, 24)}, bytes(48)),
        "does not lie where the one before it ends",
    ),
    "fewer bytes than its sizes": (_file({"w": _entry(0, 20)}, bytes(20)), "or has another size"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_is_no_whole_safetensors_file_is_refused(name: str, tmp_path: Path) -> None:
    content, words = HEADERS[name]
    (tmp_path / WEIGHTS).write_bytes(content)
    table = _table({"w": torch.zeros(2, 3)})
    for read in (check_weights, load_weights):
        with pytest.raises(BundleError, match=f"weights.safetensors: .*{words}"):
            read(tmp_path, _manifest(content), table=table)
    good = _file({"__metadata__": {"format": "pt"}, "w": _entry(0, 24)})
    (tmp_path / WEIGHTS).write_bytes(good)
    check_weights(tmp_path, _manifest(good), table=table)
    assert load_weights(tmp_path, _manifest(good), table=table)["w"].shape == (2, 3)


def test_a_file_that_is_another_one_is_not_blamed_for_anything_else(tmp_path: Path) -> None:
    """Whatever its header says: the reader is told that it was exchanged."""
    for content in (
        b"x" * 200,
        _file({"w": _entry(0, 20)}, bytes(20)),
        _file({"w": _entry(0, 24)}, b"\1" * 24),
    ):
        (tmp_path / WEIGHTS).write_bytes(content)
        for read in (check_weights, load_weights):
            with pytest.raises(BundleError, match="was changed or exchanged"):
                read(
                    tmp_path,
                    _manifest(bytes(3), num_bytes=len(content)),
                    table=_table({"w": torch.zeros(2, 3)}),
                )


def test_a_file_exchanged_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used is what was hashed: another file under the name changes nothing, another content
    of the file is seen.
    """
    tensors, path = {"v": torch.zeros(2, 3), "w": torch.ones(2, 3)}, tmp_path / WEIGHTS
    save_file(tensors, path)
    content, table, read = path.read_bytes(), _table(tensors), Reader.readinto

    def meddling(how: Callable[[], Any]) -> dict[str, Tensor]:
        left = [how]
        with monkeypatch.context() as patch:
            patch.setattr(
                Reader, "readinto", lambda self, memory: (read(self, memory), left and left.pop()())
            )
            return load_weights(tmp_path, _manifest(content), table=table)

    def rename() -> None:
        (tmp_path / "other").write_bytes(bytes(len(content)))
        (tmp_path / "other").rename(path)

    assert torch.equal(meddling(rename)["w"], torch.ones(2, 3))
    path.write_bytes(content)
    with pytest.raises(BundleError, match="was changed or exchanged"):
        meddling(lambda: path.write_bytes(content[:-1] + b"x"))
    path.write_bytes(content)
    with pytest.raises(BundleError, match="was changed or exchanged"):
        meddling(lambda: os.truncate(path, 20))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(3, 4)[:, :2], "gaps or overlap"),
        (torch.zeros(1).expand(3), "gaps or overlap"),
        (torch.zeros(2, dtype=torch.complex64), "safetensors has no complex64"),
    ],
)
def test_tensors_that_cannot_be_written_are_refused(tensor: Tensor, words: str) -> None:
    with pytest.raises(BundleError, match=rf"cannot hold odd: .*{words}"):
        stored_weights({"odd": tensor}, _table({"odd": tensor}))


def test_a_tensor_laid_out_otherwise_than_the_code_reads_it_is_refused() -> None:
    table = _table({"odd": torch.zeros(2, 3)})
    for other in (torch.zeros(3, 2).mT, torch.zeros(2, 4), torch.zeros(2, 3).double()):
        with pytest.raises(BundleError, match="cannot hold odd: it is not laid out as the code"):
            stored_weights({"odd": other}, table)
