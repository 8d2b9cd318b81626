"""Ship a model as one folder that runs programs without modeling code and without compiling:
weights, compiled code, programs.

The folder runs on machines with this torch and this kind of processor; `polar_fx.load_bundle` loads
it. More programs cost a line each: all of them share the weights and the compiled code. With
`--form onnx` the folder holds no compiled code but an ONNX graph a program, for other runtimes; all
of them share one file of weights.

Examples:
  python -m polar_fx export --out bundle --programs identity "skip 5" "repeat 10-11 x3 @0.5"
  # one program a line, # begins a comment
  python -m polar_fx export --out bundle --programs menu.txt --overwrite
  python -m polar_fx export --out bundle --model ./my-model --dtype bfloat16 \\
      --max-length 1024 --batch 8
  python -m polar_fx export --out graphs --form onnx --programs identity "skip 5"
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..output.plain_text import count, size
from .checks import check_policy
from .options import (
    add_length_argument,
    add_model_arguments,
    compile_model,
    load_model,
    program_texts,
    row_length,
    weights_as_trained,
    whole,
)
from .verbosity import working

if TYPE_CHECKING:
    from ..compiled import CompiledModel
    from ..program import Program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder to write; it must not exist yet",
    )
    parser.add_argument(
        "--form", choices=("bundle", "onnx"), default="bundle", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        metavar="FILE_OR_TEXT",
        help="program texts, and files of them; the first is what calls that name no program run; "
        "the identity is always among them (default: identity; with --predictor its menu)",
    )
    parser.add_argument(
        "--batch",
        type=whole(1),
        default=1,
        metavar="N",
        help="rows a call; from 2 up any number is served at once",
    )
    parser.add_argument(
        "--predictor",
        metavar="FOLDER",
        help="of `train`, or default: its menu and policy are shipped along",
    )
    parser.add_argument("--policy", help="by which it chooses (default: the one saved with it)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder of that form that is there"
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="leave the tokenizer's files out"
    )
    add_length_argument(parser, "256")
    add_model_arguments(parser, backend="aot_inductor")
    parser.set_defaults(dtype=None)  # so that what is given can be told from what is not


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Compile what is missing and write the bundle; returns and prints what it holds."""
    texts = program_texts(options.programs) if options.programs else None
    check_policy(options)
    if options.backend not in ("aot_inductor", "auto"):
        raise InputError(
            f"--backend {options.backend} makes no code that can be shipped; leave it out, or "
            "name aot_inductor"
        )
    if options.form == "onnx":
        return _onnx(options, texts)
    options.backend = "aot_inductor"

    from ..bundle import export
    from ..bundle.writer import check_target

    check_target(options.out, options.overwrite)  # before anything is loaded

    weights_as_trained(options)
    model, tokenizer = load_model(options)
    compiled = compile_model(model, options, max_length=options.max_length or row_length(model))
    if options.predictor is not None:
        compiled.dispatch_by(options.predictor, policy=options.policy)
    start = time.perf_counter()
    with working("compiling and writing ..."):
        manifest = export(
            compiled,
            options.out,
            _with_identity(compiled, texts),
            buckets=(1, options.batch),
            tokenizer=None if options.no_tokenizer else tokenizer,
            overwrite=options.overwrite,
        )
    seconds = time.perf_counter() - start
    if not options.json:
        regions = [f for f in manifest.files if f.region]
        print(
            f"{options.out}: {count(len(manifest.programs), 'program')}, "
            f"{size(manifest.num_bytes)}, of which {size(sum(f.num_bytes for f in regions))} are "
            f"{count(len(regions), 'compiled region')}"
        )
        print(
            f"up to {count(manifest.max_length, 'token')} a row, "
            f"{'any number of rows' if manifest.many_rows else 'row by row'}"
        )
        print(f"for {manifest.processor}, torch {manifest.torch.partition(' ')[0]}")
        print(f"fingerprint {manifest.fingerprint}")
    return {
        "folder": str(options.out),
        "fingerprint": manifest.fingerprint,
        "bytes": manifest.num_bytes,
        "seconds": seconds,
        "compiled": len(compiled.compilations),
        "manifest": manifest.to_dict(),
    }


def _with_identity(compiled: "CompiledModel", texts: list[str] | None) -> "list[Program] | None":
    """The programs, and the identity last if it is not among them: what every program is compared
    with, and what a dispatcher falls back to.
    """
    if texts is None:
        return None
    programs = [compiled.resolve(text) for text in texts]
    identity = compiled.resolve("identity")
    return programs if identity in programs else [*programs, identity]


def _onnx(options: argparse.Namespace, texts: list[str] | None) -> dict[str, Any]:
    """Write ONNX files; returns and prints what the folder holds."""
    bundles_only = {
        "--predictor": options.predictor,
        "--policy": options.policy,
        "--max-length": options.max_length,
        "--batch": options.batch - 1,
    }
    if given := [name for name, value in bundles_only.items() if value]:
        raise InputError(
            f"{given[0]} is for bundles: ONNX graphs take any batch and length, and no predictor; "
            "leave it out"
        )

    from ..bundle.writer import check_target
    from ..graph_files import export_onnx
    from ..graph_files.onnx_files import ABOUT

    check_target(options.out, options.overwrite, mark=ABOUT)  # before anything is loaded
    options.backend = "eager"  # nothing is compiled
    options.dtype = options.dtype or "float32"
    model, _ = load_model(options)
    compiled = compile_model(model, options, max_length=row_length(model))
    start = time.perf_counter()
    with working("exporting and writing ..."):
        about = export_onnx(
            compiled,
            options.out,
            programs=_with_identity(compiled, texts),
            overwrite=options.overwrite,
        )
    seconds = time.perf_counter() - start
    num_bytes = sum(entry["bytes"] for entry in (about["weights"], *about["programs"]))
    if not options.json:
        share = size(about["weights"]["bytes"])
        print(
            f"{options.out}: {count(len(about['programs']), 'program')}, {size(num_bytes)}, of "
            f"which {share} are weights"
        )
        print(f"fingerprint {about['fingerprint']}")
    return {"folder": str(options.out), "bytes": num_bytes, "seconds": seconds, "programs": about}
