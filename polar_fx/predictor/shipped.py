"""The predictor that comes with the package, for the embedded default model in bfloat16.

`bench/default_predictor.py` makes it; what it was made of and what it measured on test questions
is in its notes.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from .policy import Policy
from .saved import read_notes
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
    shipped = not isinstance(named, SavedPredictor) and os.fspath(named) == DEFAULT
    if shipped and read_notes(FOLDER)["weights"] != library.weights_fingerprint:
        raise InputError(
            f"the predictor {DEFAULT!r} is for the embedded default model in {DTYPE}, and this "
            f"model is another one or in another dtype ({library.dtype}); name neither model nor "
            "dtype, or train a predictor for this model (docs/dispatch.md)"
        )
    if not isinstance(named, SavedPredictor):
        named = SavedPredictor.of_folder(FOLDER if shipped else Path(named))
    named.require_model(library)
    return named.selector, named.policy


class TrainedOn(NamedTuple):
    """How the weights were held that a predictor was trained on; None: as they are, or not
    known.
    """

    dtype: str | None = None
    quantize: Any = None

    def unless(self, dtype: Any, quantize: Any) -> "TrainedOn":
        """These, but what is given instead."""
        return TrainedOn(dtype or self.dtype, quantize or self.quantize)


def trained_on(named: Any, model: Any = None) -> TrainedOn:
    """How to load the model that a predictor is for.

    `model` is what is asked for: None (the default model), a name, or a model that is loaded
    already, which stays as it is. Raises InputError for a folder that holds no predictor.
    """
    if not (model is None or isinstance(model, (str, os.PathLike))):
        return TrainedOn()
    if isinstance(named, SavedPredictor):
        notes = named.notes
    elif not isinstance(named, (str, os.PathLike)):
        return TrainedOn()
    elif os.fspath(named) == DEFAULT:
        return TrainedOn(DTYPE if model is None else None)
    else:
        notes = read_notes(Path(named))
    return TrainedOn(notes.get("dtype"), notes.get("quantize"))


def about() -> dict[str, Any]:
    """What the shipped predictor was made of, and what it measured on test questions (`test`)."""
    return read_notes(FOLDER)
