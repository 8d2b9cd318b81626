"""polar_fx: run any program of a language model's layers, compiled once and linked per input.

Attributes load on first use, so that `import polar_fx.program` needs neither torch nor
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    CacheError,
    CaptureError,
    InputError,
    KvOverflowError,
    ModelError,
    ModelNotFoundError,
    ModelWarning,
    NotSegmentableError,
    PolarError,
    ProgramError,
    ProgramTextError,
    UnknownBackendError,
    UnsupportedModelError,
    WeightsReplacedError,
)
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .bundle import BundledModel, BundleError, export, load_bundle
    from .compiled import CompiledModel, compile
    from .judge.choosing import Chooser
    from .judge.early_exit import EarlyExits
    from .library import LayerLibrary
    from .loading import load
    from .models import load_default, merged
    from .predictor.saved_predictor import SavedPredictor
    from .program import Blend, Op, Program, Segment

_LAZY = {
    "Blend": "program",
    "BundleError": "bundle",
    "BundledModel": "bundle",
    "Chooser": "judge.choosing",
    "CompiledModel": "compiled",
    "EarlyExits": "judge.early_exit",
    "LayerLibrary": "library",
    "Op": "program",
    "Program": "program",
    "SavedPredictor": "predictor.saved_predictor",
    "Segment": "program",
    "compile": "compiled",
    "export": "bundle",
    "load": "loading",
    "load_bundle": "bundle",
    "load_default": "models",
    "merged": "models",
}

__all__ = [
    "Blend",
    "BundleError",
    "BundledModel",
    "CacheError",
    "CaptureError",
    "Chooser",
    "CompiledModel",
    "EarlyExits",
    "InputError",
    "KvOverflowError",
    "LayerLibrary",
    "ModelError",
    "ModelNotFoundError",
    "ModelWarning",
    "NotSegmentableError",
    "Op",
    "PolarError",
    "Program",
    "ProgramError",
    "ProgramTextError",
    "SavedPredictor",
    "Segment",
    "UnknownBackendError",
    "UnsupportedModelError",
    "WeightsReplacedError",
    "compile",
    "export",
    "load",
    "load_bundle",
    "load_default",
    "merged",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
