"""A library by its symbol table from disk, so that a second process need not trace the model.

The table is found again under a fingerprint of everything that tracing could depend on
(`model_facts`). What cannot be fingerprinted (tensors of a class of their own, a method set on a
module) is traced every time. Functions of torch and of transformers' shared files are known by
their versions: who patches those in memory should pass cache=False.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..capture import CapturedModel
from ..capture.checked import capture_checked
from ..capture.trace import TRACING
from ..huge_pages import hold_in_huge_pages, model_tensors
from ..output.digest import digest
from ..store import ArtifactStore
from .library import LayerLibrary
from .model_facts import UnknownFactError, model_facts
from .symbols import SymbolTable

log = logging.getLogger("polar_fx.library")

_TABLE = "symbols.json"


Examine = Callable[[LayerLibrary], None]


def load_library(
    model: PreTrainedModel,
    check: bool,
    *,
    store: ArtifactStore | None,
    examine: Examine | None = None,
) -> LayerLibrary:
    """The model's library: from its table in `store` if that is there, else captured, and kept
    there.

    `check` as in `compile`: a table is only taken if it was checked then. A library that is traced
    here is handed to `examine` before its table is kept; what that raises is raised. Weights on the
    CPU move into huge pages where the machine has them.
    """
    hold_in_huge_pages(model_tensors(model))
    # also for what is done with a graph's symbolic sizes: while one thread traces, they fail in any
    # other
    with TRACING:
        return _load_library(model, check, store=store, examine=examine)


def _load_library(
    model: PreTrainedModel, check: bool, *, store: ArtifactStore | None, examine: Examine | None
) -> LayerLibrary:
    def capture() -> CapturedModel:
        return capture_checked(model, check=check)

    def traced() -> LayerLibrary:
        library = LayerLibrary(capture())
        if examine is not None:
            examine(library)
        return library

    if store is None:
        return traced()
    try:
        facts = {**model_facts(model), "checked": check}
    except (UnknownFactError, RecursionError) as reason:  # the latter: plain data that holds itself
        log.info("the capture is not cached: %s", reason)
        return traced()
    key = digest(facts)
    if (files := store.get(key, facts)) is not None:
        try:
            table = SymbolTable.from_json(files[_TABLE].read_text(encoding="utf-8"))
            return LayerLibrary.from_table(table, _tensors(model, table), capture=capture)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning(
                "the cached symbol table %s is of no use (%r); tracing the model", key[:12], error
            )
    library = traced()
    try:
        own = _tensors(model, library.table)
    except AttributeError as error:
        log.info("the capture is not cached: it holds a tensor that is not the model's (%s)", error)
        return library
    if all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in library.tensors.items()):
        store.get_or_make(key, facts, make=lambda folder: _write(folder, library.table))
    else:
        log.info("the capture is not cached: tracing made tensors of its own")
    return library


def _write(folder: Path, table: SymbolTable) -> None:
    (folder / _TABLE).write_text(table.to_json(), encoding="utf-8")


def _tensors(model: PreTrainedModel, table: SymbolTable) -> dict[str, Tensor]:
    """The model's tensors that the table names. Raises AttributeError if one is missing."""
    return tensors_of(model, {n for symbol in table.calls() for n in symbol.weights})


def tensors_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a module by their paths in it. Raises AttributeError if one is missing."""
    found: dict[str, Tensor] = {}
    for name in names:
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise AttributeError(name)
        found[name] = value
    return found
