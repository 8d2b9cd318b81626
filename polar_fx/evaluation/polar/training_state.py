"""The state of a training between two epochs, and its file: safetensors, with the rest as JSON in
its header.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...errors import InputError
from ...output.files import replace_file

_FORMAT, _VERSION = "polar_fx.training", "1"  # raise the version when a field changes its meaning


@dataclass
class TrainingState:
    """Finished epochs with their losses, and the best weights among them by name."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def save_state(
    path: Path,
    settings: Mapping[str, Any],
    *,
    state: TrainingState,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state, so that it is there whole or the one before still is. Raises OSError."""
    tensors = {f"network/{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
    told = {
        "epoch": state.epoch,
        "best_epoch": state.best_epoch,
        "best_loss": state.best_loss,
        "epochs": state.epochs,
    }
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": json.dumps(settings),
        "state": json.dumps(told),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata
    )
    replace_file(path, [contents])


def load_state(
    path: Path, settings: Mapping[str, Any], *, network: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainingState:
    """Read a state and put weights and moments in place.

    Raises InputError if the file is damaged, is no such state, or is of other settings, naming the
    first that differs.
    """
    remedy = "remove it to train from the beginning, or name another state file"
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            # Copies, because what is read may be the mapped file itself, and training changes
            # moments in place.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"state file {path} cannot be read ({error}); {remedy}") from error
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise InputError(
            f"state file {path} is not a training state, or was written by another version; "
            f"{remedy}"
        )
    try:
        theirs = json.loads(metadata["settings"])
        told = json.loads(metadata["state"])
        if difference := _first_difference(theirs, json.loads(json.dumps(settings))):
            raise InputError(f"state file {path} is of another training: {difference}; {remedy}")
        network.load_state_dict(_under("network/", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer/", tensors).items():
            index, _, kind = name.partition("/")
            moments.setdefault(int(index), {})[kind] = value
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        best = _under("best/", tensors)
        if best.keys() != network.state_dict().keys():
            raise KeyError("best weights")
        return TrainingState(
            told["epoch"], told["best_epoch"], told["best_loss"], told["epochs"], best
        )
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"state file {path} is incomplete ({error}); {remedy}") from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _first_difference(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], *, where: str = ""
) -> str:
    for name in sorted({*theirs, *ours}):
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _first_difference(a, b, where=f"{where}{name}."):
                return found
        elif a != b:
            return f"{where}{name} is {a!r} there and {b!r} here"
    return ""
