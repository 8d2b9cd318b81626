"""List, check or remove what is kept on disk: compiled artifacts and converted models.

Both are made again when they are needed.

Examples:
  python -m polar_fx cache ls
  python -m polar_fx cache clear --only models
  # remove what is damaged; it is compiled again when it is needed
  python -m polar_fx cache verify --repair
  python -m polar_fx cache clear --older-than 30     # not used for 30 days
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..output.plain_text import count, size
from ..store import ArtifactStore, Entry, total_bytes
from ..store.converted import (
    ConvertedModel,
    converted_folder,
    converted_models,
    remove_converted,
)
from .options import whole

ACTIONS = {
    "ls": "list them",
    "verify": "check every file; exit status 1 if some may not be used",
    "clear": "remove them",
}
_OPTIONS = {
    "repair": ("verify",),
    "older_than": ("clear",),
    "only": ("ls", "clear"),
    "yes": ("clear",),
}
# facts, any of which may be missing
_COLUMNS = (("kind", "body"), ("backend", "device", "dtype"), ("bucket",))
_DAY_S = 86400
KINDS = ("artifacts", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {what}" for name, what in ACTIONS.items()),
    )
    parser.add_argument(
        "--repair", action="store_true", help="verify: remove what may not be used, and leftovers"
    )
    parser.add_argument(
        "--older-than",
        type=whole(1),
        metavar="DAYS",
        help="clear: only those not used for so many days",
    )
    parser.add_argument(
        "--only", choices=KINDS, help="ls, clear: one of the two kinds (default: both)"
    )
    parser.add_argument("--yes", action="store_true", help="clear: do not ask")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Do it; returns what was found or removed."""
    for name, actions in _OPTIONS.items():
        if getattr(options, name) and options.action not in actions:
            raise InputError(
                f"--{name.replace('_', '-')} belongs to `cache {' and '.join(actions)}`, not to "
                f"`cache {options.action}`"
            )
    store = ArtifactStore()
    return {"ls": _list, "verify": _verify, "clear": _clear}[options.action](store, options)


def _list(store: ArtifactStore, options: argparse.Namespace) -> dict[str, Any]:
    entries = store.entries()[::-1] if options.only != "models" else []
    models = converted_models() if options.only != "artifacts" else []
    total = total_bytes(entries)
    if not options.json:
        console = Console(highlight=False)
        if entries:
            console.print(_table(entries))
        if options.only != "models":
            limit = f"of {size(store.limit_bytes)}" if store.limit_bytes else "and no limit"
            console.print(
                Text(f"{count(len(entries), 'artifact')}, {size(total)} {limit}, in {store.root}"),
                soft_wrap=True,
            )
        for line in _model_lines(models) if options.only != "artifacts" else ():
            console.print(Text(line), soft_wrap=True)
    return {
        "folder": str(store.root),
        "limit_bytes": store.limit_bytes,
        "bytes": total,
        "artifacts": list(map(_artifact, entries)),
        "models": list(map(_model, models)),
    }


def _model_lines(models: list[ConvertedModel]) -> list[str]:
    """A line a model, and their sum."""
    total = sum(model.num_bytes for model in models)
    ages = (f"{_age(m.created)} old, used {_age(m.used)} ago" for m in models)
    lines = [f"{m.name}  {size(m.num_bytes)}, {age}" for m, age in zip(models, ages, strict=True)]
    what = f"{count(len(models), 'converted model')}, {size(total)}, in {converted_folder()}"
    return [*lines, what]


def _model(model: ConvertedModel) -> dict[str, Any]:
    """JSON values."""
    return {
        "name": model.name,
        "bytes": model.num_bytes,
        "created": model.created.isoformat(),
        "used": model.used.isoformat(),
    }


def _artifact(entry: Entry) -> dict[str, Any]:
    """JSON values."""
    return {
        "key": entry.key,
        "facts": entry.facts,
        "bytes": entry.num_bytes,
        "files": {file.name: file.num_bytes for file in entry.files.values()},
        "created": entry.created.isoformat(),
        "used": entry.used.isoformat(),
    }


def _verify(store: ArtifactStore, options: argparse.Namespace) -> dict[str, Any]:
    refused = {refusal.key: refusal.reason for refusal in store.verify(options.repair)}
    num_fine = sum(entry.key not in refused for entry in store.entries())
    if not options.json:
        for key, reason in refused.items():
            print(f"{key[:12]}: {reason}")
        advice = ""
        if refused:
            advice = (
                ", and removed"
                if options.repair
                else "; `cache verify --repair` removes what is not"
            )
        print(f"{count(num_fine, 'artifact')} fit for use, {len(refused)} not{advice}")
    return {
        "folder": str(store.root),
        "ok": options.repair or not refused,
        "repaired": options.repair,
        "fine": num_fine,
        "refused": [{"key": key, "reason": reason} for key, reason in refused.items()],
    }


def _clear(store: ArtifactStore, options: argparse.Namespace) -> dict[str, Any]:
    unused_s = (options.older_than or 0) * _DAY_S
    which = f" not used for {options.older_than} days" if options.older_than else ""
    places: list[str] = []
    if options.only != "models":
        places.append(f"the artifacts{which} in {store.root}")
    if options.only != "artifacts":
        places.append(f"the converted models{which} in {converted_folder()}")
    removed, freed = 0, 0
    models: list[ConvertedModel] = []
    if options.yes or _confirmed(f"remove {' and '.join(places)}?"):
        if options.only != "models":
            removed, freed = store.clear(unused_s=unused_s)
        if options.only != "artifacts":
            models = _removed_models(unused_s)
    if not options.json:
        told: list[str] = []
        if options.only != "models":
            told.append(f"{count(removed, 'artifact')}, {size(freed)}")
        if options.only != "artifacts":
            freed_too = size(sum(model.num_bytes for model in models))
            told.append(f"{count(len(models), 'converted model')}, {freed_too}")
        print(f"removed {'; '.join(told)}")
    return {
        "folder": str(store.root),
        "removed": removed,
        "bytes": freed,
        "models": list(map(_model, models)),
    }


def _removed_models(unused_s: float) -> list[ConvertedModel]:
    """Converted models that were not used for so long, and are gone now."""
    now = datetime.now(UTC)
    old = [m for m in converted_models() if (now - m.used).total_seconds() >= unused_s]
    return [model for model in old if remove_converted(model)]


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError(f"{question} Nobody is there to ask; say --yes")
    print(question, "[y/N]", end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _table(entries: list[Entry]) -> Table:
    table = Table("key", "artifact", "backend", "shapes")
    for column in ("size", "age", "unused"):
        table.add_column(column, justify="right")
    for entry in entries:
        table.add_row(
            entry.key[:12],
            *(_facts_cell(entry, names) for names in _COLUMNS),
            size(entry.num_bytes),
            _age(entry.created),
            _age(entry.used),
        )
    return table


def _facts_cell(entry: Entry, names: Sequence[str]) -> Text:
    """Those of these facts that the artifact has; as Text, since shapes have brackets, which are
    markup to rich.
    """
    facts = map(entry.facts.get, names)
    return Text(" ".join(str(fact) for fact in facts if fact is not None))


def _age(moment: datetime) -> str:
    """`3 d`, in the largest unit that fits."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for unit, each in (("d", _DAY_S), ("h", 3600), ("min", 60)):
        if seconds >= each:
            return f"{seconds // each} {unit}"
    return f"{seconds} s"
