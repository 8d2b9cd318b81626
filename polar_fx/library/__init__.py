"""A model as a library: its distinct graphs, the symbol table of its layers' calls, and its
weights.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import LayerLibrary

__all__ = ["LayerLibrary"]


def __getattr__(name: str) -> Any:
    """Load the library when it is first used: processes that compile need `steps` alone, and no
    transformers.
    """
    if name == "LayerLibrary":
        from .library import LayerLibrary

        return LayerLibrary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
