"""Bundles: one folder with everything that programs of one model need to run, and no modeling code.

`export` writes one from a compiled model, `load_bundle` runs it. See docs/export.md. Attributes
load on first use: looking at a bundle needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import BundleError
    from .loader import BundledModel, load_bundle, verify_bundle
    from .manifest import BundledFile, Manifest, add_program, read_manifest, remove_program
    from .writer import export

_LAZY = {
    "BundleError": "errors",
    "BundledFile": "manifest",
    "BundledModel": "loader",
    "Manifest": "manifest",
    "add_program": "manifest",
    "export": "writer",
    "load_bundle": "loader",
    "read_manifest": "manifest",
    "remove_program": "manifest",
    "verify_bundle": "loader",
}

__all__ = [
    "BundleError",
    "BundledFile",
    "BundledModel",
    "Manifest",
    "add_program",
    "export",
    "load_bundle",
    "read_manifest",
    "remove_program",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
