"""`polar_fx.load`: a model to compile, or a bundle to run, from the one place a user names."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from . import models
from .bundle import load_bundle
from .bundle.manifest import read_manifest
from .errors import InputError
from .models import Device, Dtype
from .output.plain_text import dtype_name
from .quantized import Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@overload
def load(
    source: None = None,
    dtype: Dtype | None = None,
    device: Device = None,
    *,
    quantize: Quantize | None = None,
) -> "tuple[PreTrainedModel, Any]": ...


@overload
def load(
    source: str | os.PathLike[str],
    dtype: Dtype | None = None,
    device: Device = None,
    *,
    quantize: Quantize | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Any, Any]: ...


def load(
    source: str | os.PathLike[str] | None = None,
    dtype: Dtype | None = None,
    device: Device = None,
    *,
    quantize: Quantize | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Any, Any]:
    """A causal LM in eval mode, or the model of a bundle, and its tokenizer.

    Args:
        source: None for the embedded default, a local folder or `.gguf` file, the name of a model
            that installed packages carry (docs/models.md), or a HuggingFace id.
        dtype: of the weights: a torch.dtype, its name, or "auto" for what they were saved in; None
            is float32, and of a bundle what it was exported with.
        device: where to put the weights, such as "cuda"; None is the CPU, and of a bundle the
            device it was exported for.
        quantize: "int8" or "int4" to hold the weights of linear layers as integers, at their own
            size (docs/quantized.md); None leaves them as they are.

        revision: a branch, tag or commit of a HuggingFace id.
        local_files_only: take what the hub's local cache holds, and do not ask the hub.

    Returns a `transformers.PreTrainedModel`, to be given to `polar_fx.compile`, and its tokenizer.
    If `source` is a folder that `export` wrote, it returns a `BundledModel`, ready to run, and its
    tokenizer or None; no modeling code is imported.

    **Loading a bundle runs the code in it**; of other folders only safetensors are read, because a
    pickled checkpoint could run code. Load bundles that you trust; `load_bundle` takes the
    fingerprint that one must have.

    Raises ModelNotFoundError naming the remedy, BundleError, UnsupportedModelError for a model that
    cannot be quantized, and InputError for a dtype, device or way to quantize that is unknown, not
    here, or not a bundle's.
    """
    if source is None or not models.is_bundle(source):
        return models.load(
            source,
            dtype or torch.float32,
            device=device,
            quantize=quantize,
            revision=revision,
            local_files_only=local_files_only,
        )
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    if dtype not in (None, "auto") and manifest.dtype != dtype_name(dtype):
        raise InputError(
            f"{source} is a bundle of dtype torch.{manifest.dtype}, not {dtype}; leave dtype "
            "out, or export the model in that one"
        )
    if device is not None and (place := models.checked_device(device)).type != manifest.device:
        raise InputError(
            f"{source} is a bundle for {manifest.device}, not {place.type}; leave device out, or "
            "export it from there"
        )
    if quantize is not None:
        raise InputError(
            f"{source} is a bundle, whose weights are as they were exported; leave "
            f"quantize={quantize!r} out, or export the model so"
        )
    if revision is not None:
        raise InputError(
            f"{source} is a bundle in a local folder, which has no revision {revision!r}; leave it "
            "out, or take one from the hub with BundledModel.from_pretrained"
        )
    bundle = load_bundle(folder)
    return bundle, bundle.tokenizer if bundle.has_tokenizer else None
