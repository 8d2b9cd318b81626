"""Backends: how one region (a prologue, a kind of layer, an epilogue) becomes a callable."""

import torch

from ..errors import InputError, UnknownBackendError
from .aot_inductor import AotInductorBackend
from .base import Backend, PersistentBackend, Region, RegionName, ShapeClass
from .eager import EagerBackend
from .experimental.tensorrt import TensorRTBackend
from .inductor import InductorBackend

BACKENDS: dict[str, type[Backend]] = {
    b.name: b for b in (AotInductorBackend, EagerBackend, InductorBackend, TensorRTBackend)
}

__all__ = [
    "BACKENDS",
    "AotInductorBackend",
    "Backend",
    "EagerBackend",
    "InductorBackend",
    "PersistentBackend",
    "Region",
    "RegionName",
    "ShapeClass",
    "TensorRTBackend",
    "get_backend",
]


def get_backend(name: str | Backend, device: torch.device | None = None) -> Backend:
    """The backend of that name; an instance passes through. "auto" is what measures best on the
    device.

    Raises UnknownBackendError listing the known ones, and InputError for files on another GPU than
    the current one.
    """
    if isinstance(name, Backend):
        return name
    if name == "auto":
        name = "inductor" if device is not None and device.type != "cpu" else "aot_inductor"
    if name not in BACKENDS:
        raise UnknownBackendError(
            f"unknown backend {name!r}; known: auto, {', '.join(sorted(BACKENDS))}"
        )
    backend = BACKENDS[name]()
    if device is None or device.type != "cuda" or not isinstance(backend, PersistentBackend):
        return backend
    if (device.index or 0) != (current := torch.cuda.current_device()):
        raise InputError(
            f"backend {name!r} compiles for the current GPU, cuda:{current}, and the model is on "
            f"{device}; call torch.cuda.set_device first, or use backend='inductor'"
        )
    return backend
