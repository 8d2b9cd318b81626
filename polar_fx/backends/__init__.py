"""Backends: how one region (a prologue, a kind of layer, an epilogue) becomes a callable."""

from ..errors import UnknownBackendError
from .base import Backend, Region, ShapeClass
from .eager import EagerBackend
from .inductor import InductorBackend

BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (EagerBackend, InductorBackend)}

__all__ = ["BACKENDS", "Backend", "EagerBackend", "InductorBackend", "Region", "ShapeClass", "get_backend"]


def get_backend(name: str | Backend) -> Backend:
    """The backend of that name; an instance passes through. Raises UnknownBackendError listing the known ones."""
    if isinstance(name, Backend):
        return name
    if name not in BACKENDS:
        raise UnknownBackendError(f"unknown backend {name!r}; known: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]()
