"""A selector on disk: `predictor.json` (menu, features, calibration, the model it was trained for)
and `predictor.safetensors`.

Nothing in them is executed. Both are written under other names and then moved; the JSON has the
tensors' sha256, so files of two predictors are never taken for one.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import InputError, ProgramError
from ..output.files import replacing
from ..program import Program
from .features import Features
from .known_tasks import KnownTasks
from .menu import Menu
from .policy import Calibration, Policy
from .selector import Selector, SelectorNetwork

FORMAT, VERSION = "polar_fx.predictor", 1
_TASKS = "tasks."  # before the names of the tensors of KnownTasks
FILES = _JSON, _TENSORS = "predictor.json", "predictor.safetensors"


def save_selector(
    selector: Selector,
    folder: str | Path,
    *,
    model: str,
    policy: Policy | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a selector for the model of fingerprint `model` (`LayerLibrary.model_fingerprint`);
    returns the folder.

    What else is in the folder stays. `notes` (JSON values) say how it was trained. Raises
    InputError if it cannot be written.
    """
    folder = Path(folder)
    tensors = dict(selector.network.state_dict())
    tensors |= {"slopes": selector.slopes, "shifts": selector.shifts}
    if selector.tasks is not None:
        tensors |= {f"{_TASKS}{n}": getattr(selector.tasks, n) for n in KnownTasks.tensors}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    inner = selector.network.inner
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "kind": selector.kind,
        "model": model,
        "depth": selector.depth,
        "menu": list(map(str, selector.menu.programs)),
        "features": {"num_steps": selector.features.num_steps, "window": selector.features.window},
        "network": {
            "num_features": selector.num_features,
            "width": 0 if inner is None else inner.out_features,
        },
        "calibration": selector.calibration.to_dict(),
        "tasks": [] if selector.tasks is None else list(selector.tasks.names),
        "policy": str(policy or Policy("accuracy")),
        "notes": dict(notes or {}),
    }
    tensor_bytes = save(tensors)
    fields["tensors_sha256"] = hashlib.sha256(tensor_bytes).hexdigest()
    text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # both are whole before either is replaced; the JSON names the tensors' bytes and goes last:
        # a kill between the two leaves files that do not fit, which is seen
        with replacing(folder / _JSON) as made_json, replacing(folder / _TENSORS) as made_tensors:
            made_tensors.write_bytes(tensor_bytes)
            made_json.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the predictor cannot be written to {folder}: {error.strerror or error}; name another"
        ) from error
    return folder


def load_selector(folder: str | Path, model: str | None = None) -> tuple[Selector, Policy]:
    """The selector of a folder and the policy saved with it.

    Raises InputError naming the file and what is wrong with it, and if it was trained for another
    model than that of fingerprint `model` (None: not checked).
    """
    path = Path(folder) / _JSON
    fields = _described(path)
    if not isinstance(fields.get("model"), str):
        raise _damaged(path, "it names no model")
    if model is not None and fields["model"] != model:
        about = trained_for(_notes_of(fields), str(fields["model"]))
        raise InputError(
            f"the predictor in {folder} was {about}, and this model's fingerprint is "
            f"{model[:12]}... (another dtype is another one too); load the model and dtype that it "
            "is for, or train a predictor for this one"
        )
    try:
        depth = fields["depth"]
        menu = Menu(tuple(Program.parse(text, depth) for text in fields["menu"]))
        network = SelectorNetwork(
            fields["network"]["num_features"], len(menu), width=fields["network"]["width"]
        )
        tensors = load_file(path.with_name(_TENSORS))
        if not all(bool(torch.isfinite(t).all()) and t.numel() for t in tensors.values()):
            raise ValueError("a weight is not finite")
        slopes, shifts = tensors.pop("slopes"), tensors.pop("shifts")
        tasks = _known_tasks(fields.get("tasks", ()), tensors)
        network.load_state_dict(tensors)
        numbers = fields["calibration"]
        prices = {float(f): float(price) for f, price in numbers["prices"].items()}
        by_task = {str(t): _threshold(tau) for t, tau in numbers.get("by_task", {}).items()}
        calibration = Calibration(_threshold(numbers["threshold"]), prices, by_task)
        selector = Selector(
            menu,
            Features(**fields["features"]),
            network=network,
            calibration=calibration,
            slopes=slopes,
            shifts=shifts,
            tasks=tasks,
        )
        return selector, Policy.parse(fields["policy"], depth)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        ProgramError,
    ) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _known_tasks(names: Any, tensors: dict[str, Tensor]) -> KnownTasks | None:
    """Takes what belongs to it out of the tensors; None where no task has a name."""
    if not names:
        return None
    own = {name: tensors.pop(f"{_TASKS}{name}") for name in KnownTasks.tensors}
    return KnownTasks(tuple(map(str, names)), **own)


def _threshold(noted: Any) -> float:
    return math.inf if noted is None else float(noted)


def _described(path: Path) -> dict[str, Any]:
    """What a predictor's folder says of it, with the tensors that it says; raises InputError."""
    fields, data = _read(path), _bytes(path.with_name(_TENSORS))
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _damaged(path, "it describes no predictor")
    if fields.get("version") != VERSION:
        there = fields.get("version")
        raise InputError(
            f"{path} is of version {there!r}, and {VERSION} is read here; use the polar_fx that "
            "wrote it"
        )
    if hashlib.sha256(data).hexdigest() != fields.get("tensors_sha256"):
        raise _damaged(path.with_name(_TENSORS), f"its sha256 is not the one in {_JSON}")
    return fields


def _read(path: Path) -> Any:
    """The JSON value of a file. Raises InputError."""
    content = _bytes(path)
    try:
        return json.loads(content.decode())
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path.parent} holds no predictor: {error}; train one with `python -m polar_fx train`"
        ) from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged: {reason}; bring back a copy of it, or train again")


def read_notes(folder: str | Path) -> dict[str, Any]:
    """How a predictor was trained (`save_selector`'s notes), without its weights.

    Raises InputError.
    """
    return _field(folder, "notes", kind=dict, missing="it has no notes")


def read_model(folder: str | Path) -> str:
    """The fingerprint of the model that a predictor was trained for, without its weights.

    Raises InputError.
    """
    return _field(folder, "model", kind=str, missing="it names no model")


def _field(folder: str | Path, name: str, *, kind: type, missing: str) -> Any:
    """One of the fields of a predictor. Raises InputError."""
    path = Path(folder) / _JSON
    fields = _read(path)
    if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
        raise _damaged(path, missing)
    return fields[name]


def trained_for(notes: Mapping[str, Any], model: str) -> str:
    """What it was trained for, in words: by its notes, and the fingerprint of the model."""
    return f"trained for {model_of(notes)}, of fingerprint {model[:12]}..."


def model_of(notes: Mapping[str, Any]) -> str:
    """The model that notes are about, and how its weights are held, in words."""
    name = notes.get("model_name", "a model without a name")
    weights = ", ".join(str(notes[key]) for key in ("dtype", "quantize") if key in notes)
    return f"{name} in {weights}" if weights else str(name)


def _notes_of(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    notes = fields.get("notes")
    return notes if isinstance(notes, dict) else {}
