"""`polar_fx.load`: a model to compile, or a bundle to run, from the one place a user names."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from . import models
from .bundle import load_bundle
from .bundle.manifest import read_manifest
from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@overload
def load(source: None = None, dtype: torch.dtype | None = None) -> "tuple[PreTrainedModel, Any]": ...


@overload
def load(source: str | os.PathLike[str], dtype: torch.dtype | None = None) -> tuple[Any, Any]: ...


def load(source: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A causal LM in eval mode, or the model of a bundle, and its tokenizer.

    Args:
        source: None for the embedded default, a local folder, or a HuggingFace id.
        dtype: of the weights; None is float32, and of a bundle what it was exported with.

    Returns a `transformers.PreTrainedModel`, to be given to `polar_fx.compile`, and its tokenizer. If `source` is a folder
    that `export` wrote, it returns a `BundledModel`, ready to run, and its tokenizer or None; no modeling code is imported.

    **Loading a bundle runs the code in it**; of other folders only safetensors are read, because a pickled checkpoint could
    run code. Load bundles that you trust; `load_bundle` takes the fingerprint that one must have.

    Raises ModelNotFoundError naming the remedy, BundleError, and InputError for a dtype that a bundle does not have.
    """
    if source is None or not models.is_bundle(source):
        return models.load(source, dtype or torch.float32)
    folder = Path(source).expanduser()
    if dtype is not None and (own := f"torch.{read_manifest(folder).dtype}") != str(dtype):
        raise InputError(f"{source} is a bundle of dtype {own}, not {dtype}; leave dtype out, or export the model in that one")
    bundle = load_bundle(folder)
    return bundle, bundle.tokenizer if bundle.has_tokenizer else None
