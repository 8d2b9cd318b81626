"""What a trace of a model depends on: facts that a symbol table is found again under.

They are the modeling code as it is in memory, every plain attribute of every module, configs,
layouts and ties of the tensors, versions, and our own code. What cannot be fingerprinted (tensors
of a class of their own, a method set on a module) is refused.
"""

import functools
import hashlib
import json
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..passes.pipeline import library_pipeline
from ..passes.sources import digest_of_files

_OURS = ("capture", "passes", "library/symbols.py", "library/library.py")
# code that a version stands for, or that fetches and reads files and computes nothing: it keeps
# what it found out in globals, which change while a process runs
_VERSIONED = sys.stdlib_module_names | {"torch", "numpy", "transformers"}
_VERSIONED |= {"huggingface_hub", "safetensors", "packaging", "tqdm", "httpx", "requests"}
# nn.Module's own bookkeeping; hooks are refused elsewhere, tensors and submodules are looked at one
# by one
_BOOKKEEPING = frozenset(nn.Module().__dict__)


class UnknownFactError(Exception):
    """Something a trace may depend on has no fingerprint: what."""


def model_facts(model: PreTrainedModel) -> dict[str, str | int]:
    """What a trace of `model` depends on.

    Raises UnknownFactError if something has no fingerprint.
    """
    state = hashlib.sha256(json.dumps(list(_state(model)), sort_keys=True).encode()).hexdigest()
    return {
        "kind": "capture",
        "graph": type(model).__name__,
        "model": state,
        "code": _code_of(model),
        "passes": library_pipeline().content_id,
        "polar_fx": _own_code(),
        "modes": f"{torch.get_default_dtype()} "
        f"autocast={torch.is_autocast_enabled(model.device.type)}",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": transformers.__version__,
    }


def _state(model: nn.Module) -> Iterator[Any]:
    """Every module's path, class and plain attributes, and every tensor's layout and which tensors
    are one.
    """
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k not in _BOOKKEEPING}
        for name, value in own.items():
            if callable(value) and callable(getattr(type(module), name, None)):
                raise UnknownFactError(f"{path}.{name} is a method set on a module")
        attributes = {k: _plain(v, f"{path}.{k}") for k, v in own.items()}
        yield [path, _qualified(type(module)), attributes]
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, t in tensors.items():
                if t is None:
                    continue
                if type(t) not in (nn.Parameter, Tensor, nn.Buffer):
                    raise UnknownFactError(f"{path}.{name} is a {type(t).__name__}")
                full = f"{path}.{name}"
                yield [
                    kind,
                    full,
                    str(t.dtype),
                    str(t.device),
                    list(t.shape),
                    list(t.stride()),
                    first.setdefault(id(t), full),
                ]


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
        # which attention and experts to use is not in the JSON
        chosen = {
            k: _plain(v, where)
            for k, v in vars(value).items()
            if k.endswith("_implementation_internal")
        }
        return {
            "config": type(value).__name__,
            **json.loads(value.to_json_string(use_diff=False)),
            **chosen,
        }
    if isinstance(value, type):
        return _qualified(value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return [
            _qualified(value),
            _functions([value]) if isinstance(value, types.FunctionType) else "",
        ]
    if isinstance(value, functools.partial):
        return [_plain(value.func, where), _plain(value.args, where), _plain(value.keywords, where)]
    if type(value).__module__.startswith("transformers.") and hasattr(value, "to_dict"):
        return {"settings": type(value).__name__, **_plain(value.to_dict(), where)}  # type: ignore[union-attr]
    raise UnknownFactError(f"{where} is a {type(value).__name__}")


def _code_of(model: nn.Module) -> str:
    """Fingerprint of the modeling code in memory: classes of all modules, and the functions of
    their files.
    """
    code: dict[str, Any] = {}
    classes = {c for m in model.modules() for c in type(m).__mro__}
    for cls in classes:
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue  # torch's version stands for them
        code[_qualified(cls)] = _members(vars(cls), cls.__module__)
        if (source := sys.modules.get(cls.__module__)) is not None:
            code[cls.__module__] = _members(vars(source), cls.__module__)
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def _members(namespace: Mapping[str, Any], module: str) -> dict[str, str]:
    """Fingerprints of a namespace's functions and plain constants."""
    found: dict[str, str] = {}
    # transformers notes what it found out about a class in private attributes of it
    hidden = "_" if module.startswith("transformers.") else "__"
    for name, value in list(namespace.items()):
        if (function := _unwrapped(value)) is not None:
            found[name] = _functions([function])
        elif not name.startswith(hidden) and not _is_versioned(module):
            # shared files hold a number drawn at random
            found[name] = repr_plain(value)
    return found


def _unwrapped(member: Any) -> types.FunctionType | None:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if not isinstance(member, (types.FunctionType, type)):  # such as what lru_cache and jit make
        member = getattr(member, "__wrapped__", member)
    return member if isinstance(member, types.FunctionType) else None


def _functions(roots: Iterable[types.FunctionType]) -> str:
    """Fingerprint of functions, of those they close over, and of what the user's own ones call and
    read.
    """
    met: list[types.FunctionType] = list(roots)

    def text(value: Any) -> str:
        value = getattr(value, "__func__", value)
        if not isinstance(value, types.FunctionType):
            return repr_plain(value)
        if value not in met:
            met.append(value)
        return f"function {met.index(value)}"

    parts: list[Any] = []
    for function in met:  # which grows
        closed = [text(content) for content in _closed_over(function)]
        of = {} if _is_versioned(_home(function)) else function.__globals__
        read = {
            n: text(of[n])
            for n in _names(function.__code__)
            if n in of and not _is_versioned(_home(of[n]))
        }
        defaults = [
            repr_plain(function.__defaults__),
            repr_plain(tuple(sorted((function.__kwdefaults__ or {}).items()))),
        ]
        parts.append([_code(function.__code__), defaults, closed, read])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _home(function: Any) -> str:
    """The module whose names a function sees: `functools.wraps` makes `__module__` say something
    else.
    """
    scope = getattr(function, "__globals__", None)
    # of the class of functions itself it is a descriptor
    return str(scope.get("__name__", "")) if isinstance(scope, dict) else ""


def _is_versioned(module: str) -> bool:
    return module.partition(".")[0] in _VERSIONED and not module.startswith("transformers.models.")


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            yield None


def repr_plain(value: Any) -> str:
    """The text of plain values; only the type of others, whose text may hold an address."""
    if isinstance(value, tuple):
        return "(" + ", ".join(repr_plain(v) for v in value) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(repr_plain(v) for v in value) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(repr_plain(v) for v in value)) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{repr_plain(k)}: {repr_plain(v)}" for k, v in value.items()) + "}"
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    return f"{type(value).__name__} {value!r}" if plain else type(value).__name__


def _names(code: types.CodeType) -> list[str]:
    """Names that code looks up, nested code included."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return [*code.co_names, *inner]


def _code(code: types.CodeType) -> list[Any]:
    constants = [
        _code(c) if isinstance(c, types.CodeType) else repr_plain(c) for c in code.co_consts
    ]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


@functools.cache
def _own_code() -> str:
    """Fingerprint of the files here that shape a capture."""
    here = Path(__file__).parent.parent
    files = [
        f
        for name in _OURS
        for f in ([here / name] if name.endswith(".py") else (here / name).glob("*.py"))
    ]
    return digest_of_files(files, here)
