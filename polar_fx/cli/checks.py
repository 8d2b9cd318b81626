"""What can be refused before torch is imported or anything is loaded: programs, places, names."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import (
    InputError,
    ModelNotFoundError,
    ProgramError,
    ProgramTextError,
    UnknownBackendError,
)
from ..output.suggestions import did_you_mean
from ..program import Program

BACKENDS = ("auto", "aot_inductor", "eager", "inductor", "tensorrt")
DEFAULT_DEPTH = 30
"""Layers of the embedded model."""

_ANY_DEPTH = 1024  # deeper than models are, and shallow enough to be laid out
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_names(options: argparse.Namespace) -> None:
    """Refuse a wrong --model, --backend or --program of the options, where a command has them.

    Raises ModelNotFoundError, UnknownBackendError, ProgramError.
    """
    model = getattr(options, "model", None)
    if model is not None:
        _check_model(model)
    backend = getattr(options, "backend", None)
    if backend is not None and backend not in BACKENDS:
        raise UnknownBackendError(
            f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}"
            f"{did_you_mean(backend, BACKENDS)}"
        )
    programs = getattr(options, "program", None)
    if isinstance(programs, list):
        texts = [text for text in programs if not os.path.isfile(text)]  # some take files of them
        check_programs(texts, DEFAULT_DEPTH if model is None else None)


def check_programs(texts: Sequence[str], depth: int | None) -> None:
    """Refuse texts that are no programs of a model of `depth` layers; where that is not known yet,
    texts that are none of any model.

    Raises ProgramError.
    """
    for text in texts:
        try:
            Program.parse(text, depth or (None if "/" in text else _ANY_DEPTH))
        except ProgramTextError:
            raise
        except ProgramError:
            if depth is not None:
                raise


def _check_model(name: str) -> None:
    if name.lower().endswith(".gguf"):  # a file that is a model
        return
    place = Path(name).expanduser()
    if os.path.isfile(place):  # unlike the method, it takes a name that is too long
        raise ModelNotFoundError(
            f"{name} is a file; name the folder that holds it: --model {place.parent}"
        )
    if not os.path.isdir(place) and not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"there is no folder {name}; name one written by save_pretrained or by `export`, or a "
            "HuggingFace id such as owner/name"
        )


def check_policy(options: argparse.Namespace) -> None:
    """Refuse a --policy without --predictor, and one that is no policy of any model.

    Raises InputError.
    """
    if options.policy is None:
        return
    if options.predictor is None:
        raise InputError(
            f"--policy {options.policy!r} needs --predictor; name one, or leave it out"
        )
    from ..predictor.policy import Policy

    own = DEFAULT_DEPTH if options.model is None else _ANY_DEPTH
    written = re.search(r"/\s*(\d+)\s*$", options.policy)
    Policy.parse(options.policy, int(written[1]) if written else own)
