"""A model as a library: its distinct graphs, the symbol table of its layers' calls, and its
weights.
"""

from .library import LayerLibrary

__all__ = ["LayerLibrary"]
