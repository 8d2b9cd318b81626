"""What is inside a bundle's files, held against each other before anything runs.

Compiled code reads its operands by the sizes and strides it was compiled for and checks nothing
itself. So the symbol table, the weights file (see weights.py), the regions and the limits of the
manifest must say the same.

Shape legend: B batch, T tokens, L KV length.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..backends.base import RegionName, ShapeClass
from ..capture import KvSpec, StateSpec
from ..errors import ProgramError
from ..library.symbols import Operand, Symbol, SymbolTable
from ..output.plain_text import count, dtype_name
from .errors import BundleError
from .fields import SHA256
from .files import parse_json
from .manifest import SHARING_FORMAT, Manifest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
_DTYPE_NAMES = {
    dtype_name(value) for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_ROLES = ("input", "hidden", "side", "kv", "state", "weight")
_BODY = re.compile(r"[A-Za-z0-9_]{1,128}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,14}")
# an expression of the axes, which nothing here evaluates
_SIZE = re.compile(r"[0-9BTL+*() -]{1,200}")
_MAX_AXES, _MAX_SIDES = 16, 4096
_MAX_SLOT_WIDTH = 1 << 24  # elements that one token takes in one slot, or that a state has


def region_names(table: SymbolTable, shapes: Iterable[ShapeClass]) -> list[RegionName]:
    """Every region that any program needs for calls of these shape classes."""
    kinds = list(dict.fromkeys(call.target for call in table.layers))
    cut = dict.fromkeys(
        call.target for layer, call in enumerate(table.layers) if table.ends_in_kv_writes(layer)
    )
    found: list[RegionName] = []
    for shape in shapes:
        bodies = [table.prologue.target, *kinds, table.epilogue.target]
        found += [RegionName(body, shape) for body in bodies]
        if shape.tokens is None:  # the last step of a prefill is its KV writes, and then one token
            found += [RegionName(kind, shape, kv_writes=True) for kind in cut]
    return found


def weight_operands(table: SymbolTable) -> dict[str, Operand]:
    """How the code that reads each weight takes it to be laid out, by the weight's name."""
    found: dict[str, Operand] = {}
    for call in table.calls():
        operands = [o for o in table.bodies[call.target].operands if o.role == "weight"]
        found.update(zip(call.weights, operands, strict=True))
    return found


def layout(operand: Operand) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Size, stride and dtype of a weight."""
    return tuple(map(int, operand.size)), tuple(map(int, operand.stride)), NAMES[operand.dtype]


def num_elements(size: Iterable[int], stride: Iterable[int]) -> int:
    """Elements of memory from a tensor's first to its last one; 0 if it is empty."""
    pairs = list(zip(size, stride, strict=True))
    if any(s == 0 for s, _ in pairs):
        return 0
    return 1 + sum((s - 1) * step for s, step in pairs)


# ------------------------------------------------------------------------------------- symbol table


def read_table(path: Path, text: bytes, *, manifest: Manifest) -> SymbolTable:
    """The symbol table, after everything it says was held against the manifest.

    Raises BundleError naming `path`.
    """
    parse_json(path, text)  # the table's own reader would take a name twice
    try:
        table = SymbolTable.from_json(text.decode())
        problem = _problem_of_table(table, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(path, f"is no symbol table: {type(error).__name__} {error}") from error
    if problem:
        raise BundleError(path, problem)
    if hashlib.sha256(table.to_json().encode()).hexdigest() != manifest.graphs:
        raise BundleError(path, "is not the table whose fingerprint the manifest names")
    return table


def _problem_of_table(table: SymbolTable, manifest: Manifest) -> str | None:
    """What is wrong with it, as the end of a sentence."""
    if len(table.layers) != manifest.depth or len(table.kv_specs) != manifest.depth:
        return f"has {count(len(table.layers), 'layer')}, the manifest says {manifest.depth}"
    for name, body in table.bodies.items():
        if not (type(name) is str and _BODY.fullmatch(name)) or not _is_text(
            body.fingerprint, SHA256
        ):
            return (
                f"names a body {name!r} with fingerprint {body.fingerprint!r}, which is malformed"
            )
        for operand in body.operands:
            if problem := _problem_of_operand(operand):
                return f"has an operand of {name} that {problem}"
    for call in table.calls():
        if problem := _problem_of_call(table, call):
            return f"has a call of {call.target!r} that {problem}"
    if problem := _problem_of_owners(table, manifest):
        return problem
    for layer, call in enumerate(table.layers):
        if not _is_slot(table.kv_specs[layer]):
            return f"has no usable slot for layer {layer}: {table.kv_specs[layer]}"
        spec = table.slot_spec(layer)
        if not _fits(spec, table.bodies[call.target].operands):
            return f"gives layer {layer} a slot {spec} that {call.target} was not compiled for"
    return None


def _problem_of_owners(table: SymbolTable, manifest: Manifest) -> str | None:
    """What is wrong with the layers that read the slots of others, as the end of a sentence."""
    if table.owners and manifest.version < SHARING_FORMAT:
        return f"has layers that read the slots of others, which format {manifest.version} has not"
    for reader, owner in table.owners.items():
        is_reader = 0 <= owner < reader < manifest.depth and not table.kv_specs[reader].roles
        if not is_reader or owner in table.owners or table.kv_specs[owner].states:
            return f"lets layer {reader} read the slot of layer {owner}"
    for program in manifest.programs:
        try:
            table.slot_steps(program)
        except ProgramError as error:
            return f"does not fit a program of the manifest: {error}"
    return None


def _is_slot(spec: KvSpec) -> bool:
    """Whether its parts can be allocated: keys and values or none of both, further columns, and
    states.
    """
    numbers = [n for state in spec.states for n in state.size]
    numbers += [n for part in spec.more_columns for n in (part.heads, part.size)]
    if type(spec.heads) is not int or spec.heads:
        numbers += spec.heads, spec.key_size, spec.value_size
    if not all(type(n) is int and 0 < n <= _MAX_SLOT_WIDTH for n in numbers):
        return False
    if any(math.prod(state.size) > _MAX_SLOT_WIDTH for state in spec.states):
        return False
    dtypes = {spec.dtype, *(part.dtype for part in (*spec.states, *spec.more_columns))}
    return dtypes <= set(DTYPES.values())


def _fits(spec: KvSpec, operands: Iterable[Operand]) -> bool:
    """Whether a body takes the parts of this slot, laid out as they are allocated."""
    slots = [o for o in operands if o.role in ("kv", "state")]
    if tuple(o.role for o in slots) != spec.roles:
        return False
    for operand, shape in zip(slots, spec.shapes(1, 1), strict=True):
        if len(operand.size) != len(shape):
            return False
        kept = (1, 3) if operand.role == "kv" else range(1, len(shape))
        if any(operand.size[i] != str(shape[i]) for i in kept):
            return False
    states = zip(slots[spec.num_kv :], spec.states, strict=True)
    return all(_is_laid_out(operand, state) for operand, state in states)


def _is_laid_out(operand: Operand, state: StateSpec) -> bool:
    """Whether compiled code reads a state as it is allocated: its dtype, one row after another."""
    strides = torch.empty((1, *state.size), device="meta").stride()
    return operand.dtype == dtype_name(state.dtype) and operand.stride == tuple(map(str, strides))


def _problem_of_operand(operand: Operand) -> str | None:
    if operand.role not in _ROLES or operand.dtype not in (
        NAMES if operand.role == "weight" else _DTYPE_NAMES
    ):
        return f"is a {operand.role!r} of dtype {operand.dtype!r}"
    if len(operand.size) != len(operand.stride) or len(operand.size) > _MAX_AXES:
        return f"has sizes {operand.size} and strides {operand.stride}"
    pattern = _NUMBER if operand.role == "weight" else _SIZE
    if not all(_is_text(text, pattern) for text in (*operand.size, *operand.stride)):
        return f"has malformed sizes {str(operand.size)[:80]} or strides {str(operand.stride)[:80]}"
    return None


def _problem_of_call(table: SymbolTable, call: Symbol) -> str | None:
    if call.target not in table.bodies:
        return "has no body"
    roles = [o.role for o in table.bodies[call.target].operands]
    is_start = call is table.prologue
    if not all(type(side) is int and 0 <= side < _MAX_SIDES for side in call.sides):
        return f"takes side values {str(call.sides)[:80]}"
    if len(call.sides) != roles.count("input" if is_start else "side"):
        return f"takes {len(call.sides)} side values where its body takes {roles.count('side')}"
    if not all(type(name) is str and name for name in call.weights) or len(
        call.weights
    ) != roles.count("weight"):
        return f"takes {len(call.weights)} weights where its body takes {roles.count('weight')}"
    return None


def _is_text(value: Any, pattern: re.Pattern[str]) -> bool:
    return type(value) is str and pattern.fullmatch(value) is not None


# ------------------------------------------------------------------------------------------ regions


def check_regions(path: Path, manifest: Manifest, *, table: SymbolTable) -> None:
    """Every region that the shapes need is named, and no other one. Raises BundleError."""
    wanted, found = (
        set(region_names(table, manifest.shapes)),
        {f.region for f in manifest.files if f.region},
    )
    for what, regions in (
        ("does not name", wanted - found),
        ("names, though nothing calls it,", found - wanted),
    ):
        if regions:
            raise BundleError(path, f"{what} region {min(regions, key=str)}")
