"""Bundles: one folder with everything that programs of one model need to run, and no modeling code.

`export` writes one from a compiled model, `load_bundle` runs it. See docs/export.md.
"""

from .errors import BundleError
from .loader import BundledModel, load_bundle, verify_bundle
from .manifest import BundledFile, Manifest, add_program, read_manifest, remove_program
from .writer import export

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
