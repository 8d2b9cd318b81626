"""What a command answers prompts with: a model on compiled regions or interpreted, or a bundle."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import compile_model
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
        status().print(
            "[dim]interpreting: `python -m polar_fx compile` makes regions that run faster, once[/]"
        )
    return compile_model(model, options, max_length=max_length)


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
