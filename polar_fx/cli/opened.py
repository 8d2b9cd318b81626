"""What a command answers prompts with: a model on compiled regions or interpreted, or a bundle."""

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import compile_model, row_length
from .threads import warn_if_busy
from .verbosity import status, working

if TYPE_CHECKING:
    from ..compiled import CompiledModel

BACKEND = "eager"
"""What answers where nothing is compiled."""


def compiled_or_interpreted(
    model: Any,
    options: argparse.Namespace,
    *,
    max_length: int | None,
    programs: Sequence[str | None],
) -> "CompiledModel":
    """By the backend that is asked for; or else on compiled regions, if all that the programs need
    are in the store, and interpreted if not.
    """
    warn_if_busy()
    if options.backend is None:
        options.backend = "auto"
        if model.device.type == "cpu" and _any_compiled():
            compiled = compile_model(model, options, max_length=max_length)
            if not any(compiled.explain(p).missing for p in programs):
                return compiled
        options.backend = BACKEND
        compiled = compile_model(model, options, max_length=max_length)
        text = f"interpreting: {_faster(options, compiled, usual=row_length(model))}"
        status().print(text, style="dim", markup=False, soft_wrap=True)
        return compiled
    return compile_model(model, options, max_length=max_length)


def _faster(options: argparse.Namespace, compiled: "CompiledModel", *, usual: int) -> str:
    """What makes compiled regions for this very model and length, to be pasted; `usual` is the
    length that `compile` takes by itself.
    """
    if compiled.device.type != "cpu":
        return "--backend auto compiles regions that run faster, each time"
    words = [
        f"--{name} {shlex.quote(str(value))}"
        for name in ("model", "dtype", "quantize")
        if (value := getattr(options, name, None)) not in (None, "float32")
    ]
    length = compiled.pool.max_length
    if length != usual:
        words.append(f"--max-length {length}")
    command = " ".join(("python -m polar_fx compile", *words))
    return f"`{command}` makes regions that run faster, once"


def _any_compiled() -> bool:
    """Whether the store holds a compiled region of whatever model."""
    from ..store import ArtifactStore

    return any("region" in str(entry.facts["kind"]) for entry in ArtifactStore().entries())


def bundle_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """The bundle that --model names, and its tokenizer.

    Raises InputError for options that are a bundle's own, and for one without a tokenizer.
    """
    from ..loading import load

    for name in ("dtype", "quantize", "device", "backend", "max_length", "predictor"):
        if getattr(options, name, None):
            raise InputError(
                f"--{name.replace('_', '-')} is for models; the bundle {options.model} has its "
                "own, leave it out"
            )
    warn_if_busy()
    with working("loading the bundle ..."):
        bundle, tokenizer = load(options.model)
    if tokenizer is None:
        raise InputError(
            f"the bundle {options.model} holds no tokenizer to read a prompt with; export it with "
            "one"
        )
    return bundle, tokenizer
