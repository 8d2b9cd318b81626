"""The predictor that comes with the package, for the embedded default model in bfloat16.

`bench/default_predictor.py` makes it; what it was made of and what it measured on test questions
is in its notes.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .policy import Policy
from .saved import load_selector, read_notes
from .selector import Selector

if TYPE_CHECKING:
    from ..library import LayerLibrary

DEFAULT = "default"
"""Its name, where a predictor is named."""

DTYPE = "bfloat16"
"""Of the model it is for."""

FOLDER = Path(__file__).with_name("default")


def load_named(named: str | os.PathLike[str], library: "LayerLibrary") -> tuple[Selector, Policy]:
    """The predictor of a folder, or the shipped one by its name, and the policy saved with it.

    Raises InputError as `load_selector`, and where the model is not the one it was made for.
    """
    if os.fspath(named) != DEFAULT:
        return load_selector(Path(named), library.model_fingerprint)
    notes = read_notes(FOLDER)
    # the weights alone: graphs differ between versions of torch and transformers
    if notes["weights"] != library.weights_fingerprint:
        raise InputError(
            f"the predictor {DEFAULT!r} is for the embedded default model in {DTYPE}, and this "
            f"model is another one or in another dtype ({library.dtype}); name neither model nor "
            "dtype, or train a predictor for this model (docs/dispatch.md)"
        )
    return load_selector(FOLDER)


def dtype_of(named: Any) -> str | None:
    """The dtype to load the default model in for this predictor; None: whichever."""
    return DTYPE if isinstance(named, str) and named == DEFAULT else None


def about() -> dict[str, Any]:
    """What the shipped predictor was made of, and what it measured on test questions (`test`)."""
    return read_notes(FOLDER)
