"""Programs of one model as ONNX files in one folder, for runtimes that are not torch; all of them
share one file of weights.

See `onnx_graphs.py` for the graphs. The folder is written beside its target and renamed, as a
bundle is.

Shape legend: B batch, T tokens, L KV length, W tokens of a row whose logits are asked for.
"""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..bundle.files import digest_of
from ..bundle.loader import BundledModel
from ..bundle.manifest import WEIGHTS
from ..bundle.weights import stored_weights
from ..bundle.writer import check_target, new_folder, programs_to_ship, require_room, save_weights
from ..compiled import CompiledModel, ProgramLike
from ..environment import install_command
from ..errors import InputError
from ..output.files import sync, write_file
from ..output.plain_text import count, dtype_name, size
from ..version import __version__
from .program_file import check_one_pass, described_slots

log = logging.getLogger("polar_fx.bundle")

ABOUT = "programs.json"
_GRAPH_BYTES = 1 << 21  # more than any program's graph takes


def export_onnx(
    compiled: CompiledModel,
    out: str | PathLike[str],
    *,
    programs: Iterable[ProgramLike] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write programs of a float32 model on the CPU to the new folder `out`, an ONNX file each and
    one file of weights.

    One graph prefills and decodes. It takes `input_ids` and `positions` i64[B, T], `logits_at`
    i64[B, W], the places among the T tokens whose logits are wanted, and of each step s the slots
    `past.s.key` and `past.s.value` [B, heads, L, size]; it returns `logits` [B, W, vocabulary] and
    `present.s.key`, `present.s.value`: the slots with the T tokens at their positions. B, T, L and
    W are free. Traces the model if that has not happened.

    `programs` as in `export`; `overwrite` replaces a folder that this wrote. Returns what
    `programs.json` then says: texts, files and slots. Raises InputError, ProgramError,
    CaptureError, and BundleError if the folder cannot be written.
    """
    if isinstance(compiled, BundledModel):
        raise InputError(
            f"the bundle {compiled.folder} holds no graphs; export ONNX from a compiled model"
        )
    library = compiled.library
    if library.dtype != torch.float32 or library.device.type != "cpu":
        raise InputError(
            "ONNX files are written for float32 on the CPU, and the model is "
            f"{dtype_name(library.dtype)} on {library.device}; load it in "
            "float32, and let the runtime convert it"
        )
    check_one_pass(compiled, "an ONNX graph")
    chosen = programs_to_ship(compiled, programs)
    target = check_target(out, overwrite, mark=ABOUT)
    try:
        from . import onnx_graphs as graphs
    except ImportError as error:
        raise InputError(
            f"writing ONNX needs packages that are not installed ({error}); "
            f"{install_command('onnx')}"
        ) from error
    weights, ties = stored_weights(library.tensors, library.table)
    weight_bytes = sum(t.nbytes for t in weights.values())
    require_room(target.parent, weight_bytes + len(chosen) * _GRAPH_BYTES)
    functions = graphs.export_functions(library)
    with new_folder(target, overwrite, mark=ABOUT) as work:
        save_weights(weights, work / WEIGHTS)
        places = graphs.external_weights(work / WEIGHTS, ties)
        entries = []
        for number, program in enumerate(chosen):
            file = work / f"program_{number}.onnx"
            graph = graphs.program_graph(library, program, functions=functions, weights=places)
            write_file(file, graph)
            slots = described_slots(library.kv_specs(program))
            entries.append({"program": str(program), **_described(file), "slots": slots})
        about = {
            "polar_fx_onnx": 1,
            "polar_fx": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": compiled.architecture,
            "depth": library.depth,
            "dtype": "float32",
            "vocab_size": compiled.vocab_size,
            "opset": graphs.OPSET,
            "fingerprint": library.model_fingerprint,
            "weights": _described(work / WEIGHTS),
            "programs": entries,
        }
        write_file(work / ABOUT, json.dumps(about, indent=1).encode())
        sync(work)
    num_bytes = about["weights"]["bytes"] + sum(e["bytes"] for e in entries)
    log.info("wrote %s: %s, %s", target, count(len(chosen), "ONNX program"), size(num_bytes))
    return about


def _described(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)}
