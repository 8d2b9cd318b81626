"""A library by its symbol table from disk, so that a second process need not trace the model.

The table is found again under a fingerprint of everything that tracing could depend on: the modeling code as it is in
memory, every plain attribute of every module, configs, layouts and ties of the tensors, versions, and our own code.
What cannot be fingerprinted (tensors of a class of their own, functions set on a module) is traced every time.
"""

import functools
import hashlib
import json
import logging
import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .capture import CapturedModel
from .check import capture_checked
from .library import LayerLibrary
from .passes.pipeline import library_pipeline
from .store import ArtifactStore, digest
from .symbols import SymbolTable

log = logging.getLogger("polar_fx.library")

_TABLE = "symbols.json"
_OURS = ("capture", "passes", "symbols.py", "library.py", "check.py")
# nn.Module's own bookkeeping; hooks are refused elsewhere, tensors and submodules are looked at one by one
_BOOKKEEPING = frozenset(nn.Module().__dict__)


class _Unknown(Exception):
    """Something a trace may depend on has no fingerprint: what."""


def load_library(model: PreTrainedModel, check: bool, store: ArtifactStore | None) -> LayerLibrary:
    """The model's library: from its table in `store` if that is there, else captured, and kept there.

    `check` as in `compile`: a table is only taken if it was checked then.
    """

    def capture() -> CapturedModel:
        return capture_checked(model, check=check)

    if store is None:
        return LayerLibrary(capture())
    try:
        facts = {**model_facts(model), "checked": check}
    except _Unknown as reason:
        log.info("the capture is not cached: %s", reason)
        return LayerLibrary(capture())
    key = digest(facts)
    if (files := store.get(key, facts)) is not None:
        try:
            table = SymbolTable.from_json(files[_TABLE].read_text(encoding="utf-8"))
            return LayerLibrary.from_table(table, _tensors(model, table), capture)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("the cached symbol table %s is of no use (%r); tracing the model", key[:12], error)
    library = LayerLibrary(capture())
    try:
        own = _tensors(model, library.table)
    except AttributeError as error:
        log.info("the capture is not cached: it holds a tensor that is not the model's (%s)", error)
        return library
    bound = (library.prologue, *library.layers, library.epilogue)
    names = [n for symbol in library.table.calls() for n in symbol.weights]
    if all(own[n].data_ptr() == w.data_ptr() for n, w in zip(names, (w for c in bound for w in c.weights), strict=True)):
        store.get_or_make(key, facts, lambda folder: _write(folder, library.table))
    else:
        log.info("the capture is not cached: tracing made tensors of its own")
    return library


def _write(folder: Path, table: SymbolTable) -> None:
    (folder / _TABLE).write_text(table.to_json(), encoding="utf-8")


def _tensors(model: PreTrainedModel, table: SymbolTable) -> dict[str, Tensor]:
    """The model's tensors that the table names. Raises AttributeError if one is missing."""
    found: dict[str, Tensor] = {}
    for name in {n for symbol in table.calls() for n in symbol.weights}:
        value: Any = model
        for part in name.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise AttributeError(name)
        found[name] = value
    return found


def model_facts(model: PreTrainedModel) -> dict[str, str | int]:
    """What a trace of `model` depends on. Raises _Unknown if something has no fingerprint."""
    state = hashlib.sha256(json.dumps(list(_state(model)), sort_keys=True).encode()).hexdigest()
    return {
        "kind": "capture",
        "graph": type(model).__name__,
        "model": state,
        "code": _code_of(model),
        "passes": library_pipeline().content_id,
        "polar_fx": _own_code(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": transformers.__version__,
    }


def _state(model: nn.Module) -> Iterator[Any]:
    """Every module's path, class and plain attributes, and every tensor's layout and which tensors are one."""
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        attributes = {k: _plain(v, f"{path}.{k}") for k, v in vars(module).items() if k not in _BOOKKEEPING}
        yield [path, _qualified(type(module)), attributes]
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, t in tensors.items():
                if t is None:
                    continue
                if type(t) not in (nn.Parameter, Tensor, nn.Buffer):
                    raise _Unknown(f"{path}.{name} is a {type(t).__name__}")
                full = f"{path}.{name}"
                yield [kind, full, str(t.dtype), t.device.type, list(t.shape), list(t.stride()), first.setdefault(id(t), full)]


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value if not isinstance(value, Enum) else str(value)
    if isinstance(value, (torch.dtype, torch.device, Enum)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v, where) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(v, where), sort_keys=True) for v in value)
    if isinstance(value, dict):
        return {str(k): _plain(v, where) for k, v in value.items()}
    if isinstance(value, PreTrainedConfig):
        return {"config": type(value).__name__, **json.loads(value.to_json_string(use_diff=False))}
    if isinstance(value, type):
        return _qualified(value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return [_qualified(value), _function(value) if isinstance(value, types.FunctionType) else ""]
    if isinstance(value, types.MethodType):  # bound to a module, whose state is seen anyway
        return [_qualified(value), _function(value.__func__)]
    if isinstance(value, functools.partial) and not value.keywords:
        return [_plain(value.func, where), _plain(value.args, where)]
    if type(value).__module__.startswith("transformers.") and hasattr(value, "to_dict"):
        return {"settings": type(value).__name__, **_plain(value.to_dict(), where)}
    raise _Unknown(f"{where} is a {type(value).__name__}")


def _code_of(model: nn.Module) -> str:
    """Fingerprint of the modeling code in memory: classes of all modules, and the functions of their files."""
    code: dict[str, Any] = {}
    for cls in {c for m in model.modules() for c in type(m).__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins")}:
        members = vars(cls).items()
        code[_qualified(cls)] = {k: _function(f) for k, v in members if (f := _unwrapped(v)) is not None}
        source = sys.modules.get(cls.__module__)
        functions = vars(source).items() if source is not None else ()
        code[cls.__module__] = {k: _function(v) for k, v in functions if isinstance(v, types.FunctionType)}
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def _unwrapped(member: Any) -> types.FunctionType | None:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return member if isinstance(member, types.FunctionType) else None


def _function(function: types.FunctionType) -> str:
    """Fingerprint of a function: its code, defaults and what it closes over, as far as that is plain."""
    closed = []
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            content = None
        closed.append(content.__code__.co_code.hex() if isinstance(content, types.FunctionType) else type(content).__name__)
    parts = [_code(function.__code__), repr_plain(function.__defaults__), closed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def repr_plain(value: Any) -> str:
    """The text of plain values; only the type of others, whose text may hold an address."""
    if isinstance(value, tuple):
        return "(" + ", ".join(repr_plain(v) for v in value) + ")"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str, bytes)) else type(value).__name__


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr_plain(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


@functools.cache
def _own_code() -> str:
    """Fingerprint of the files here that shape a capture."""
    here = Path(__file__).parent
    files = sorted(f for name in _OURS for f in ([here / name] if name.endswith(".py") else (here / name).glob("*.py")))
    seen = hashlib.sha256()
    for file in files:
        seen.update(file.name.encode() + b"\0" + file.read_bytes())
    return seen.hexdigest()
