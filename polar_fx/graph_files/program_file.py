"""One program as a `torch.export` file: its operators and the weights it uses, for any processor,
without polar_fx.

Larger and slower than a bundle (a copy of the weights a program, nothing compiled), but bound to no
machine and no torch build: the form from which other compilers start.

Shape legend: B batch, T tokens, L KV length, S steps, H KV heads, E head size, V vocabulary.
"""

import json
import os
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends.specialize import exported_graph
from ..bundle.errors import BundleError
from ..bundle.files import os_errors
from ..bundle.loader import BundledModel
from ..capture import KvSpec
from ..errors import CaptureError, InputError
from ..output.files import replacing
from ..output.plain_text import dtype_name, first_line

if TYPE_CHECKING:
    from ..compiled import CompiledModel, ProgramLike

ABOUT = "polar_fx.json"  # the extra file that tells what the program is
# of examples: distinct primes, so that no two axes are taken for one another
SIZES = {"B": 3, "T": 7, "L": 23}


class _Flat(nn.Module):
    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.program = graph

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_index: Tensor, slots: list[Tensor]
    ) -> Tensor:
        return self.program(input_ids, positions, kv_index, *slots)


def export_program(
    compiled: "CompiledModel",
    program: "ProgramLike",
    *,
    path: str | PathLike[str],
    overwrite: bool = False,
) -> Path:
    """Write one program as a `.pt2` file that `torch.export.load` reads; traces the model if that
    has not happened.

    The exported module takes `input_ids` and `positions` i64[B, T], `kv_index` i64[L] (0 .. L - 1)
    and `slots`, keys [B, H, L, E] and values of step 0, and further columns if it has some, then
    those of step 1 and so on, which it writes in place at the positions; it returns logits
    [B, T, V]. B, T and L are free. The extra file `polar_fx.json` tells the program and the sizes
    of each step's slot.

    Raises InputError, ProgramError, CaptureError, and BundleError if the file cannot be written; it
    is whole or not there.
    """
    if isinstance(compiled, BundledModel):
        raise InputError(
            f"the bundle {compiled.folder} holds no graphs; export the program from a compiled "
            "model"
        )
    check_one_pass(compiled, "an exported program")
    target = Path(os.path.abspath(path))
    if target.suffix != ".pt2":
        raise InputError(f"torch.export reads files that end in .pt2, got {target.name!r}")
    if not target.parent.is_dir():
        raise BundleError(
            target, "is in no folder that exists", remedy=f"make {target.parent} first"
        )
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        raise BundleError(
            target, "exists already", remedy="name another file, or say overwrite=True"
        )
    chosen, library = compiled.resolve(program), compiled.library
    specs, device, (b, t, n) = library.kv_specs(chosen), library.device, SIZES.values()
    positions = torch.arange(t, device=device) + torch.arange(b, device=device)[:, None]
    slots = [part for spec in specs for part in spec.slot(b, length=n, device=device)]
    batch, tokens, length = (torch.export.Dim(name) for name in ("batch", "tokens", "length"))
    rows = {0: batch, 1: tokens}
    shapes = (rows, rows, {0: length}, [{0: batch, 2: length}] * len(slots))
    example = (torch.zeros_like(positions), positions, torch.arange(n, device=device), slots)
    about = {
        "program": str(chosen),
        "depth": chosen.depth,
        "dtype": dtype_name(library.dtype),
        "fingerprint": library.model_fingerprint,
        "slots": described_slots(specs),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals
        try:
            exported = exported_graph(_Flat(library.flat_graph(chosen)), example, shapes=shapes)
        except Exception as error:
            raise CaptureError(
                f"torch.export cannot take program {chosen}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        exported.example_inputs = None  # type: ignore[assignment]  # nothing is to be run when it is loaded
        with os_errors(target), replacing(target) as work:
            _save(exported, json.dumps(about), path=work, named=target)
    return target


def check_one_pass(compiled: "CompiledModel", what: str) -> None:
    """Raise InputError if rows may become so long that the model computes them anew, or if it keeps
    states or its layers read keys and values of others, none of which a graph of one pass (`what`)
    does.
    """
    compiled.library.require_no_states(what)
    compiled.library.require_own_kv(what)
    if (switch := compiled.runner.switch) is not None:
        raise InputError(
            f"past {switch} tokens this model computes a whole row with other rotary frequencies "
            f"(longrope), which {what} cannot do; compile with max_length={switch}"
        )


def described_slots(specs: Sequence[KvSpec]) -> list[dict[str, Any]]:
    """Sizes of each step's slot, for JSON."""
    found: list[dict[str, Any]] = []
    for spec in specs:
        sizes = {"heads": spec.heads, "key_size": spec.key_size, "value_size": spec.value_size}
        more = [{"heads": part.heads, "size": part.size} for part in spec.more_columns]
        found.append({**sizes, "more_keys": more} if more else sizes)
    return found


def _save(exported: torch.export.ExportedProgram, about: str, *, path: Path, named: Path) -> None:
    """Write the file at `path`, which errors call `named`. Raises BundleError and OSError."""
    try:
        with path.open("xb") as file:
            torch.export.save(exported, file, extra_files={ABOUT: about})
    except RuntimeError as error:  # torch's own writer; in which the system's error is but text
        raise BundleError(
            named,
            f"cannot be written: {first_line(error)}",
            remedy="free some space there, or name a file on another disk",
        ) from error
