"""Show a model's layers, what the passes did, and programs as pictures or as graph text.

Examples:
  python -m polar_fx inspect --program "skip 5" --program "0-9 (10-11)*3@0.5 12-29"
  python -m polar_fx inspect --graph library         # prologue, distinct layer graphs, epilogue
  python -m polar_fx inspect --program "skip 5" --graph diff
"""

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..explain.picture import picture
from ..output.plain_text import dtype_name, ranges
from ..program.strip import LEGEND
from .options import add_model_arguments, compile_model, load_model

if TYPE_CHECKING:
    from ..compiled import CompiledModel
    from ..program import Program

GRAPHS = {
    "before": "the flat graph as captured",
    "library": "after the library passes: prologue, distinct layers, epilogue, and the calls",
    "after": "the step graph of the program",
    "flat": "the program inlined to one graph",
    "diff": "library against step graph",
    "engines": "what of each region backend='tensorrt' would run in engines; needs no TensorRT",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="program text; may be given several times",
    )
    which = "; ".join(f"{name}: {what}" for name, what in GRAPHS.items())
    parser.add_argument("--graph", choices=GRAPHS, help=f"print graph text instead ({which})")
    add_model_arguments(parser, backend="eager")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Print the summary or one graph; returns the same as values."""
    model, _ = load_model(options)
    compiled = compile_model(model, options, max_length=16)
    programs = [compiled.resolve(p) for p in options.program or ["identity"]]
    if options.graph:
        text = _graph(compiled, programs[0], which=options.graph)
        if not options.json:
            print(text)
        return {"program": str(programs[0]), "graph": text}
    summary = _summary(compiled, programs)
    if not options.json:
        _show(summary, programs)
    return summary


def _graph(compiled: "CompiledModel", program: "Program", *, which: str) -> str:
    from ..explain.tensorrt_parts import partition_report
    from ..passes import graph_diff, graph_text

    library = compiled.library
    if which == "engines":
        return partition_report(library).text()
    if which == "diff":
        return graph_diff(library.graph_module, library.program_graph(program))
    graph = {
        "before": lambda: library.captured.graph_module,
        "library": lambda: library.graph_module,
        "after": lambda: library.program_graph(program),
        "flat": lambda: library.flat_graph(program),
    }[which]()
    return graph_text(graph)


def _summary(compiled: "CompiledModel", programs: list["Program"]) -> dict[str, Any]:
    library = compiled.library
    parts = []
    counted = Counter(call.target for call in library.layers)
    calls = {call.target: call for call in (library.prologue, *library.layers, library.epilogue)}
    for name, graph in library.bodies.items():
        layers = [i for i, call in enumerate(library.layers) if call.target == name]
        num_parameters = sum(w.numel() for w in calls[name].weights)
        num_bytes = sum(w.nbytes for w in calls[name].weights)
        parts.append(
            {
                "graph": name,
                "calls": counted.get(name, 1),
                "layers": layers,
                "nodes": len(graph.graph.nodes),
                "parameters_each": num_parameters,
                "bytes_each": num_bytes,
            }
        )
    kv_bytes = {spec.bytes_per_token() for spec in library.captured.kv_specs}
    passes = [
        {"name": r.name, "modified": r.modified, "counts": r.counts, "time_ms": r.time_ms}
        for r in library.records
    ]
    return {
        "model": type(compiled.config).__name__,
        "depth": compiled.depth,
        "dtype": dtype_name(compiled.dtype),
        "capture_s": library.captured.seconds,
        "fingerprint": library.fingerprint,
        "graphs": parts,
        "kv_bytes_per_token_and_step": sorted(kv_bytes),
        "passes": passes,
        "programs": [_program_summary(compiled, program) for program in programs],
    }


def _program_summary(compiled: "CompiledModel", program: "Program") -> dict[str, Any]:
    layers = [compiled.library.layers[i] for i in program.path]
    return {
        "program": str(program),
        "steps": program.num_steps,
        "unique_layers": program.num_unique_layers,
        "fingerprint": program.fingerprint,
        "parameters": sum(w.numel() for layer in layers for w in layer.weights),
    }


def _show(summary: dict[str, Any], programs: list["Program"]) -> None:
    console = Console(highlight=False)
    kv = " or ".join(str(b) for b in summary["kv_bytes_per_token_and_step"])
    console.print(
        f"[bold]{summary['model']}[/]: {summary['depth']} layers, {summary['dtype']}, {kv} KV "
        "bytes a token and step"
    )
    table = Table("graph", "layers", "nodes", "parameters each", "MB each")
    for part in summary["graphs"]:
        table.add_row(
            part["graph"],
            ranges(part["layers"]),
            str(part["nodes"]),
            f"{part['parameters_each']:,}",
            f"{part['bytes_each'] / 1e6:.1f}",
        )
    console.print(table)
    for record in summary["passes"]:
        counts = ", ".join(f"{k} {v}" for k, v in record["counts"].items()) or "unchanged"
        console.print(f"{record['name']}: {counts} [dim]({record['time_ms']:.0f} ms)[/]")
    for program in programs:
        print()
        print(picture(program))
    print()
    print(LEGEND)
