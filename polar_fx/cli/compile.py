"""Compile ahead of time what programs need, so that later processes start warm; report it, and
explain each program.

Regions depend on the greatest length and on whether there is one row or more: name those that the
programs will run with. The default length is that of `run` and `demo`, as long as prompt and answer
fit.

Examples:
  python -m polar_fx compile  # what every program of SmolLM2 needs for one row
  python -m polar_fx compile --program "skip 5" --program "repeat 10-11 x3 @0.5" \\
      --graph programs.svg
  python -m polar_fx compile --program "skip 5" --tier whole --max-length 1024
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..output.files import write_whole
from .options import (
    add_length_argument,
    add_model_arguments,
    compile_model,
    load_model,
    row_length,
    warm_up,
    whole,
)
from .verbosity import status

if TYPE_CHECKING:
    from ..explain.program_report import Explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="program text; may be given several times",
    )
    parser.add_argument(
        "--batch",
        type=whole(1),
        default=1,
        metavar="N",
        help="rows a call; from 2 up any number is served",
    )
    parser.add_argument(
        "--tier",
        choices=("linked", "whole"),
        default="linked",
        help="whole: each program as one graph, too",
    )
    add_length_argument(parser, "256")
    parser.add_argument(
        "--graph",
        type=Path,
        metavar="OUT",
        help="draw each program: OUT.svg, or OUT.dot for graphviz",
    )
    add_model_arguments(parser, backend="auto")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Compile; returns and prints the report and the explanations."""
    if options.graph is not None:
        _check_graph(options.graph)  # before anything is loaded
    if options.tier == "whole" and options.batch > 1:
        raise InputError(
            f"--tier whole serves one row, and --batch is {options.batch}; leave one of them out"
        )

    from ..backends import PersistentBackend, get_backend

    get_backend(options.backend)
    model, _ = load_model(options)
    compiled = compile_model(
        model, options, max_length=options.max_length or row_length(model), tier=options.tier
    )
    programs = list(dict.fromkeys(compiled.resolve(p) for p in options.program or ["identity"]))
    seconds = warm_up(compiled, programs, batch=options.batch)
    if not isinstance(compiled.backend, PersistentBackend):
        status().print(
            f"[dim]backend {compiled.backend.name} keeps no compiled code: later processes start "
            "cold[/]"
        )
    report, explanations = compiled.report(), [compiled.explain(p, options.batch) for p in programs]
    graphs = _draw(explanations, options.graph) if options.graph is not None else []
    if not options.json:
        print("\n\n".join(part.text() for part in (report, *explanations)))
        for path in graphs:
            status().print(f"[dim]drew {path}[/]")
    return {
        "report": report.to_dict(),
        "programs": [e.to_dict() for e in explanations],
        "compile_s": seconds,
        "graphs": list(map(str, graphs)),
    }


def _draw(explanations: "list[Explanation]", path: Path) -> list[Path]:
    """A picture a program; several are numbered."""
    paths = (
        [path]
        if len(explanations) == 1
        else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(len(explanations))]
    )
    svg = path.suffix == ".svg"
    return [
        e.svg(p) if svg else write_whole(e.dot().encode(), p)
        for e, p in zip(explanations, paths, strict=True)
    ]


def _check_graph(path: Path) -> None:
    if path.suffix not in (".svg", ".dot"):
        raise InputError(
            f"--graph {path} has no known suffix; name a file that ends in .svg or .dot"
        )
    if not path.parent.is_dir():
        raise InputError(f"--graph {path} is in no folder that exists; make {path.parent} first")
