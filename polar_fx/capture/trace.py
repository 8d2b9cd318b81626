"""HuggingFace causal LM -> flat FX graph with weights, KV and positions made explicit.

The model traced is a view: a structural copy that shares every tensor with the user's model, so
nothing is written to the user's object.

Shape legend: B batch, T tokens, L KV length, V vocabulary.
"""

import io
import logging
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from transformers import PreTrainedModel

from ..errors import CaptureError, UnsupportedModelError
from ..passes.base import in_slot, is_size, storage, writes
from .captured import ALIGNMENT, CapturedModel, KvSpec
from .experts import replace_expert_loops
from .extension import CACHE, Slots, register
from .open_sizes import sizes_stay_open
from .reasons import replaced_forward, why_it_is_not_traced
from .recurrences import replace_recurrences
from .rotary import choose_frequencies_by_row
from .stored import Stored, probe
from .support import (
    attention_variants,
    check_supported,
    embedding_weight,
    find_stack,
    first_position,
    give_layers_modules_of_their_own,
    last_position,
    position_limit,
    shared_view,
    unwrapped,
    without_autocast,
)

log = logging.getLogger("polar_fx.capture")

TRACING = threading.RLock()  # torch.export is not made for threads

# Example sizes for tracing: distinct primes, so that no two axes are mistaken for one another.
_B, _T, _L = 3, 7, 23


class _Traced(nn.Module):
    def __init__(
        self, model: PreTrainedModel, last: int | None, *, by_length: bool, stored: Stored
    ) -> None:
        super().__init__()
        self.model, self.last, self.by_length, self.stored = model, last, by_length, stored
        self.recurrences = replace_recurrences(model)
        self.limit = position_limit(model)
        self.first = first_position(model)

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_index: Tensor, kv: list[Tensor]
    ) -> Tensor:
        # padding is written to a spare column, which may lie beyond the model's own table of
        # positions: only the table is spared
        places = positions if self.last is None else positions.clamp(max=self.last)
        if self.by_length:  # padding must not count for the length of its row
            places = torch.where(positions == kv_index[-1:], 0, places)
        cache = Slots(positions, kv_index, places=places, parts=self.stored.slots(kv))
        cache.limit = self.limit
        self.recurrences.rows = cache
        # "no padding", for code that would otherwise make such a mask from a length it believes to
        # be a number
        mask = torch.ones_like(kv_index).expand(input_ids.shape[0], -1)
        if any(spec.states for spec in self.stored.specs):  # these want a mask of the new tokens
            mask = torch.ones_like(input_ids)
        given: dict[str, Any] = {CACHE: cache}
        return self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=places + self.first if self.first else places,
            use_cache=True,
            **given,
        ).logits


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals, and prints half a graph when it fails; neither
    helps a user.
    """
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _export(
    view: PreTrainedModel, stored: Stored, *, by_length: bool, sizes: dict[str, Any]
) -> torch.export.ExportedProgram:
    """The traced view; `sizes` has the least or the most columns of slots, or tokens of a call, as
    arguments of `Dim`, where it is not for any number.
    """
    device = embedding_weight(view).device
    positions = torch.arange(_T, device=device) + torch.arange(_B, device=device)[:, None]
    specs = stored.specs
    slots = [part for spec in specs for part in spec.slot(_B, length=_L, device=device)]
    batch, tokens, length = (
        torch.export.Dim("batch"),
        torch.export.Dim("tokens", **sizes.get("tokens", {})),
        torch.export.Dim("length", **sizes.get("length", {})),
    )
    rows = {0: batch, 1: tokens}
    varies = {"kv": {0: batch, 2: length}, "state": {0: batch}}
    parts = [varies[role] for spec in specs for role in spec.roles]
    shapes = (rows, rows, {0: length}, parts)
    example = (torch.zeros_like(positions), positions, torch.arange(_L, device=device), slots)
    with torch.no_grad(), _quiet(), sizes_stay_open(view):
        return torch.export.export(
            _Traced(view, last_position(view), by_length=by_length, stored=stored),
            example,
            dynamic_shapes=shapes,
            strict=False,
            # torch before 2.13 cannot prove relations such as min(16 * L, 32 * L) == 16 * L, which
            # grouped heads lead to, and would refuse the model; the sizes our tables hand over
            # fulfil them
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _export_in_bounds(
    view: PreTrainedModel, stored: Stored, *, by_length: bool
) -> torch.export.ExportedProgram:
    """The view traced for any sizes; if its code takes some for a case of their own, for those that
    there are: slots are no shorter than `ALIGNMENT`, and a row is no longer than it may be.
    """
    sizes: dict[str, Any] = {}
    while True:
        try:
            return _export(view, stored, by_length=by_length, sizes=sizes)
        except UserError as error:
            bounds = {"length": {"min": ALIGNMENT}, "tokens": {"max": position_limit(view)}}
            named = [n for n in bounds if f"({n})" in str(error).partition("\n")[0]]
            if not named or sizes.keys() >= {*named}:
                raise
            sizes = {**sizes, **{name: bounds[name] for name in named}}


def _flatten(
    exported: torch.export.ExportedProgram, stack: str, *, specs: tuple[KvSpec, ...]
) -> GraphModule:
    """Exported program -> flat graph: weights become get_attr nodes, every node knows its layer."""
    slots = (
        (role, layer, part)
        for layer, spec in enumerate(specs)
        for part, role in enumerate(spec.roles)
    )
    signature = exported.graph_signature
    tensors: dict[str, Any] = {}
    graph = Graph()
    env: dict[Node, Node] = {}
    kinds = {s.arg.name: s for s in signature.input_specs}  # type: ignore[union-attr]
    in_layer = re.compile(rf"(?:^|\.)model\.{re.escape(stack)}\.(\d+)(?:\.|$)")
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if node.name.startswith("kv_") and node.name != "kv_index":
                    role, layer, part = next(slots)
                    new = graph.placeholder(f"{role}_{layer}_{part}")
                    new.meta = {"role": role, "slot": layer, "part": part}
                else:
                    new = graph.placeholder(node.name)
                    new.meta = {"role": "input"}
            else:
                target = str(spec.target).removeprefix("model.")
                tensors[target] = _tensor(exported, spec)
                new = graph.get_attr(target)
                new.meta = {}
            new.meta["val"] = node.meta["val"]
            env[node] = new
        elif node.op == "output":
            graph.output(env[node.args[0][0]])
        elif node.op == "get_attr":
            raise UnsupportedModelError(
                f"the trace holds a nested graph ({node.target})",
                "data-dependent control flow is not supported",
            )
        elif writes(node) and env[buffer := storage(node)].op == "get_attr":
            if node.target is not torch.ops.aten.copy_.default or node is not next(
                iter(buffer.users)
            ):
                raise UnsupportedModelError(
                    f"the forward pass writes to {env[buffer].target}",
                    "a model that keeps state between calls is not supported",
                )
            # computed anew by each call, as rotary frequencies may be: no write is needed
            env[node] = env[node.args[1]]
        else:
            env[node] = new = graph.node_copy(node, env.__getitem__)
            new.meta = {"val": node.meta.get("val"), "layer": _layer_of(node, in_layer)}
    return GraphModule(tensors, graph, class_name="Flat")


def _tensor(exported: torch.export.ExportedProgram, spec: Any) -> Tensor:
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        value = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
        if isinstance(value, Tensor):
            return value
    raise UnsupportedModelError(
        f"the trace needs an input of kind {spec.kind}", "report this model"
    )


def _read_from_slots(flat: GraphModule, stored: Stored) -> None:
    """Let layers that store nothing read the slots of other layers where they take what these have
    just written there: keys and values of all tokens, which are the same.
    """
    silent = set(stored.silent)
    for node in flat.graph.nodes:
        if (layer := node.meta.get("layer")) not in silent:
            continue
        for source in node.all_input_nodes:
            slot = storage(source)
            written = source.target is torch.ops.aten.index_put_.default and source.args[0] is slot
            if written and in_slot(slot) and source.meta.get("layer") != layer:
                node.replace_input_with(source, slot)
    flat.recompile()


def _check_silent(flat: GraphModule, stored: Stored) -> None:
    """Raise UnsupportedModelError if a layer that stores nothing takes more than one value of other
    layers, such as keys that are in no slot.
    """
    for silent in stored.silent:
        taken = {
            source
            for node in flat.graph.nodes
            if node.meta.get("layer") == silent
            for source in node.all_input_nodes
            if source.meta.get("layer") not in (None, silent) and not is_size(source)
        }
        if len(taken) > 1:
            raise stored.refused_silence()


def _layer_of(node: Node, in_layer: re.Pattern[str]) -> int | None:
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if match := in_layer.search(path):
            return int(match[1])
    return None


def capture(model: PreTrainedModel, attention: str | None = None) -> CapturedModel:
    """Trace `model` into a flat FX graph; the model is neither changed nor copied.

    `attention` is one of `attention_variants(model)`, by default the first. `check.capture_checked`
    picks the variant that agrees with the model.

    Raises UnsupportedModelError for models whose layers cannot be skipped or repeated soundly and
    CaptureError when tracing itself fails; both say what to do.
    """
    check_supported(model)
    with TRACING, without_autocast(embedding_weight(model).device):
        return _capture(model, attention)


def _capture(model: PreTrainedModel, attention: str | None) -> CapturedModel:
    start = time.perf_counter()
    register()
    stack = find_stack(model)
    depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
    view = unwrapped(shared_view(model, attention or attention_variants(model)[0]))
    give_layers_modules_of_their_own(view.get_submodule(stack))
    by_length = choose_frequencies_by_row(view)
    stored = probe(view, stack, depth=depth)
    replace_expert_loops(view)
    try:
        exported = _export_in_bounds(view, stored, by_length=by_length)
    except UnsupportedModelError:
        raise
    except Exception as error:
        log.info("torch.export failed on %s: %r", type(model).__name__, error)
        raise CaptureError(
            f"torch.export could not trace {type(model).__name__}: "
            f"{why_it_is_not_traced(error, view)}"
        ) from error
    flat = _flatten(exported, stack, specs=stored.specs)
    runs_layers = any(node.meta.get("layer") is not None for node in flat.graph.nodes)
    if not runs_layers and (remark := replaced_forward(view)):
        raise CaptureError(f"the trace of {type(model).__name__} runs none of its layers{remark}")
    _read_from_slots(flat, stored)
    _check_silent(flat, stored)
    seconds = time.perf_counter() - start
    log.info(
        "captured %s: %d layers, %d nodes in %.1f s",
        type(model).__name__,
        depth,
        len(flat.graph.nodes),
        seconds,
    )
    return CapturedModel(flat, depth, stored.specs, stack, seconds)
