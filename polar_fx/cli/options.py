"""Options that commands share, and the loading that goes with them."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..output.plain_text import size
from .verbosity import status, working

if TYPE_CHECKING:
    from ..compiled import CompiledModel
    from ..runtime.tiers import Tier

_SHORTEST = 256
_MAX_FILE_BYTES = 1 << 24
DTYPES = ("float32", "bfloat16", "float16", "auto")
QUANTIZE = ("int8", "int4")


def whole(minimum: int) -> Any:
    """An argparse type: a whole number of at least `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}"
            )
        return value

    return convert


def add_model_arguments(parser: argparse.ArgumentParser, backend: str) -> None:
    """--model, --dtype, --quantize, --device, --backend."""
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="model to run (default: the embedded SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights; auto: as saved (default: float32, or what a predictor is for)",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="hold the weights of linear layers as integers (default: as --dtype says)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="where to run: cpu, cuda, cuda:1 (default: cpu)"
    )
    known = "auto, aot_inductor, eager, inductor or tensorrt"
    parser.add_argument("--backend", default=backend, help=f"{known} (default: {backend})")


def add_length_argument(parser: argparse.ArgumentParser, least: str) -> None:
    """--max-length; commands that name none use `row_length`."""
    what = (
        f"tokens a row may hold; regions are compiled for it (default: {least}, a power of "
        "two, as far as the model goes)"
    )
    parser.add_argument("--max-length", type=whole(1), metavar="N", help=what)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--sample, --temperature, --top-p, --seed."""
    parser.add_argument("--sample", action="store_true", help="sample; default: greedy")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="of sampling, the same for every program"
    )


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What `generate` takes of these. Raises InputError."""
    if options.temperature <= 0 or not 0 < options.top_p <= 1:
        raise InputError(
            f"need --temperature above 0 and --top-p in (0, 1], got {options.temperature} and "
            f"{options.top_p}"
        )
    if not options.sample:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}


def row_length(model: Any, tokens: int = 1) -> int:
    """`max_length` for rows of `tokens`: a power of two within the model's limit, so that rows of
    many lengths share regions.
    """
    length = max(_SHORTEST, 1 << (tokens - 1).bit_length())
    from ..models import longest_row

    return max(tokens, longest_row(model, length))


def weights_as_trained(options: argparse.Namespace) -> None:
    """Fill in --dtype and --quantize, where they are not given, by what the predictor was trained
    on. Raises InputError for a folder that holds none.
    """
    from ..predictor.shipped import trained_on

    found = trained_on(options.predictor, options.model).unless(options.dtype, options.quantize)
    options.dtype, options.quantize = found.dtype or "float32", found.quantize


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that the options name. Raises ModelNotFoundError."""
    from transformers.utils import logging

    from ..models import load

    logging.disable_progress_bar()
    with working("loading the model ..."):
        return load(options.model, options.dtype, device=options.device, quantize=options.quantize)


def compile_model(
    model: Any, options: argparse.Namespace, *, max_length: int | None, tier: "Tier" = "linked"
) -> "CompiledModel":
    """Capture, with the seconds it took, or that it was not necessary, on stderr."""
    from ..compiled import compile

    start = time.perf_counter()
    with working("capturing the model's graph ..."):
        compiled = compile(model, options.backend, max_length=max_length, tier=tier)
    seconds = time.perf_counter() - start
    what = f"captured {compiled.depth} layers"
    if not compiled.library.is_traced:
        what = f"read {compiled.depth} layers from the symbol table on disk"
    status().print(f"[dim]{what} in {seconds:.1f} s[/]")
    return compiled


def warm_up(compiled: "CompiledModel", programs: Any, *, batch: int = 1) -> float:
    """Compile what the programs need, with a status line; returns seconds."""
    start = time.perf_counter()
    with working("compiling ..."):
        regions = compiled.warmup(programs, batch)
    seconds = time.perf_counter() - start
    if regions:
        status().print(
            f"[dim]compiled {len(regions)} regions in {seconds:.1f} s; every program runs on "
            "them[/]"
        )
    return seconds


def program_texts(given: list[str]) -> list[str]:
    """The program texts among `given`, and those of the files among it, one a line; # begins a
    comment.

    Raises InputError.
    """
    found: list[str] = []
    for value in given:
        if not _is_file(value):
            found.append(value)
            continue
        path = Path(value)
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise InputError(
                    f"{value} has {size(path.stat().st_size)}; a file of programs is much smaller"
                )
            lines = [
                line.partition("#")[0].strip()
                for line in path.read_text(encoding="utf-8").splitlines()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{value} cannot be read: {error}") from error
        found += [line for line in lines if line]
        if not any(lines):
            raise InputError(f"{value} holds no program; write one a line")
    return found


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # a text too long for a path, or with a null character
        return False
