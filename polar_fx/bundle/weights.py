"""The weights of a bundle: every tensor once in one safetensors file, and back in memory as the
code reads it.

The file is read once: each tensor's bytes go into memory of its own, where they are hashed. The
library's reader takes names of files, which would then be opened a second time; so the header, a
line of JSON, is read here.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..library.symbols import SymbolTable
from .contents import DTYPES, NAMES, layout, num_elements, weight_operands
from .errors import BundleError
from .fields import Fields
from .files import MAX_JSON_BYTES, Reader, parse_json, verified
from .manifest import SYMBOLS, WEIGHTS, Manifest

_MAX_AXES, _MAX_SIZE = 16, 1 << 44
# a tensor as the header has it: its dtype in safetensors' words, and its sizes
_Stored = tuple[str, tuple[int, ...]]


def check_weights(folder: Path, manifest: Manifest, *, table: SymbolTable) -> None:
    """Hold the weights file against manifest and symbol table. Raises BundleError."""
    file = manifest.file(WEIGHTS)
    with verified(folder, WEIGHTS, num_bytes=file.num_bytes, sha256=file.sha256) as reader:
        _check(_header(reader, file.num_bytes), folder, manifest=manifest, table=table)


def load_weights(folder: Path, manifest: Manifest, *, table: SymbolTable) -> dict[str, Tensor]:
    """The weights by name, checked as in `check_weights` while they are read; tied names share a
    tensor.

    Each is in memory of its own, laid out as the code reads it. Not mapped from the file: that
    would be slower to read at every token, and could change under us. Raises BundleError.
    """
    file = manifest.file(WEIGHTS)
    with verified(folder, WEIGHTS, num_bytes=file.num_bytes, sha256=file.sha256) as reader:
        stored = _header(reader, file.num_bytes)
        _check(stored, folder, manifest=manifest, table=table)
        operands = weight_operands(table)
        takers = {manifest.ties.get(name, name): operand for name, operand in operands.items()}
        loaded: dict[str, Tensor] = {}
        for name in stored:
            size, stride, dtype = layout(takers[name])
            tensor = torch.empty(size, dtype=dtype)
            reader.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            loaded[name] = (
                tensor
                if stride == _dense(size)
                else torch.empty_strided(size, stride, dtype=dtype).copy_(tensor)
            )
    return {name: loaded[manifest.ties.get(name, name)] for name in operands}


def _header(reader: Reader, num_bytes: int) -> dict[str, _Stored]:
    """The tensors in the order of the file, which they fill without a gap. Raises BundleError."""
    path, no_file = reader.path, "is no safetensors file"
    length = int.from_bytes(reader.read(8), "little") if num_bytes > 8 else 0
    if not 2 <= length <= min(MAX_JSON_BYTES, num_bytes - 8):
        raise BundleError(path, f"{no_file}: its header cannot be {length:,} bytes long")
    values = parse_json(path, reader.read(length))
    if not isinstance(values, dict):
        raise BundleError(path, f"{no_file}: its header is no JSON object")
    found: list[tuple[int, int, str, _Stored]] = []
    for name, value in values.items():
        if name == "__metadata__":
            continue
        fields = Fields(
            path, f"tensor {name[:80]!r}", value=value, names=("dtype", "shape", "data_offsets")
        )
        dtype, shape, offsets = (
            fields.text("dtype"),
            fields.items("shape", 0, most=_MAX_AXES),
            fields.items("data_offsets", 2, most=2),
        )
        if dtype not in DTYPES:
            raise fields.wrong("dtype", f"is {dtype!r}, and the code takes none of that")
        if not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in (*shape, *offsets)):
            raise fields.wrong(
                "shape", "and data_offsets must hold whole numbers of a tensor's size"
            )
        found.append((*offsets, name, (dtype, tuple(shape))))
    end = 0
    for start, stop, name, (dtype, shape) in sorted(found):
        if start != end or stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise BundleError(
                path,
                f"{no_file}: tensor {name[:80]!r} does not lie where the one before it ends, or "
                "has another size",
            )
        end = stop
    if end != num_bytes - 8 - length:
        raise BundleError(
            path,
            f"{no_file}: its tensors take {end:,} bytes, and it has {num_bytes - 8 - length:,} "
            "for them",
        )
    return {name: stored for _, _, name, stored in sorted(found)}


def _check(
    there: Mapping[str, _Stored], folder: Path, *, manifest: Manifest, table: SymbolTable
) -> None:
    """Hold what the weights file has against manifest and symbol table. Raises BundleError."""
    path, wanted = folder / WEIGHTS, weight_operands(table)
    stored = {name: manifest.ties.get(name, name) for name in wanted}
    if strangers := sorted(set(manifest.ties) - set(wanted)):
        raise BundleError(
            path,
            f"is said to hold {strangers[0]!r} under another name, and nothing takes that tensor",
        )
    first: dict[str, str] = {}
    for name, operand in wanted.items():
        if stored[name] not in there:
            raise BundleError(path, f"holds no tensor {stored[name]!r}, which {name} needs")
        dtype, found = there[stored[name]]
        size, stride, expected = layout(operand)
        if found != size or DTYPES[dtype] != expected:
            raise BundleError(
                path,
                f"holds {stored[name]} as {dtype} {found}, and the code takes {operand.dtype} "
                f"{size}",
            )
        if num_elements(size, stride) != num_elements(size, _dense(size)):
            raise BundleError(
                folder / SYMBOLS, f"gives {name} strides {stride} that leave gaps or overlap"
            )
        other = first.setdefault(stored[name], name)
        if layout(wanted[other]) != (size, stride, expected):
            raise BundleError(
                folder / SYMBOLS,
                f"takes {name} to be laid out otherwise than {other}, its other name",
            )
    if surplus := sorted(set(there) - set(stored.values())):
        raise BundleError(path, f"holds a tensor {surplus[0]!r} that nothing takes")
    dtypes = [dtype for _, _, dtype in map(layout, wanted.values()) if dtype.is_floating_point]
    if not dtypes or str(dtypes[0]) != f"torch.{manifest.dtype}":
        raise BundleError(
            folder / SYMBOLS,
            f"has weights of other dtypes than {manifest.dtype}, as the manifest says",
        )
    rows = [layout(wanted[name])[0][:1] for name in table.prologue.weights]
    if max((r[0] for r in rows if r), default=0) < manifest.vocab_size:
        raise BundleError(
            folder / SYMBOLS,
            f"has no table of {manifest.vocab_size:,} token ids, as the manifest says",
        )


def stored_weights(
    tensors: Mapping[str, Tensor], table: SymbolTable
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, dense and each once, and the names that are another one's.

    Raises BundleError.
    """
    written: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, operand in weight_operands(table).items():
        tensor = tensors[name]
        if operand.dtype not in NAMES:
            raise BundleError(
                WEIGHTS,
                f"cannot hold {name}: safetensors has no {operand.dtype}",
                remedy="load the model in another dtype",
            )
        size, stride, dtype = layout(operand)
        given = [step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
        taken = [step for n, step in zip(size, stride, strict=True) if n > 1]
        if tuple(tensor.shape) != size or given != taken or tensor.dtype != dtype:
            raise BundleError(
                WEIGHTS,
                f"cannot hold {name}: it is not laid out as the code that reads it takes it",
                remedy="report this model",
            )
        if num_elements(size, stride) != num_elements(size, _dense(size)):
            raise BundleError(
                WEIGHTS,
                f"cannot hold {name}: its strides {stride} leave gaps or overlap",
                remedy="load it as a dense tensor",
            )
        key = (tensor.data_ptr(), size, stride, dtype) if tensor.numel() else name
        if key in first:
            ties[name] = first[key]
            continue
        first[key] = name
        dense = tensor.detach().cpu().contiguous()
        # a slice of a larger tensor would be written as part of that one
        whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
        written[name] = dense if whole else dense.clone()
    return written, ties


def _dense(size: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for n in reversed(size):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
