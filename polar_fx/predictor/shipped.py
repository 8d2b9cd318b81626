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
from .saved_predictor import SavedPredictor
from .selector import Selector

if TYPE_CHECKING:
    from ..library import LayerLibrary

DEFAULT = "default"
"""Its name, where a predictor is named."""

DTYPE = "bfloat16"
"""Of the model it is for."""

FOLDER = Path(__file__).with_name("default")


def load_named(
    named: str | os.PathLike[str] | SavedPredictor, library: "LayerLibrary"
) -> tuple[Selector, Policy]:
    """The predictor of a folder, a loaded one, or the shipped one by its name, and the policy saved
    with it.

    Raises InputError as `load_selector`, and where the model is not the one it was made for.
    """
    if isinstance(named, SavedPredictor):
        named.require_model(library)
        return named.selector, named.policy
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


def dtype_of(named: Any, model: Any = None) -> str | None:
    """The dtype to load the model in that a predictor is for; None: whichever.

    `model` is what is asked for: None (the default model), a name, or a model that is loaded
    already. Raises InputError for a folder that holds no predictor.
    """
    if isinstance(named, SavedPredictor):
        noted = named.notes.get("dtype")
    elif not isinstance(named, (str, os.PathLike)):
        return None
    elif os.fspath(named) == DEFAULT:
        noted = DTYPE if model is None else None
    else:
        noted = read_notes(Path(named)).get("dtype")
    return noted if model is None or isinstance(model, (str, os.PathLike)) else None


def about() -> dict[str, Any]:
    """What the shipped predictor was made of, and what it measured on test questions (`test`)."""
    return read_notes(FOLDER)
