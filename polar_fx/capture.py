"""HuggingFace causal LM -> flat FX graph with weights, KV and positions made explicit.

This is the only file that knows how a model is put together, and it knows no model by name. The unchanged
modeling code is traced through three public extension points of transformers: a `Cache` whose slots are graph
inputs, an attention function and a mask function registered under names of our own. The model traced is a view: a structural copy that shares
every tensor with the user's model, so nothing is written to the user's object.

Shape legend: B batch, T tokens, L KV length, H KV heads, E head size, V vocabulary.
"""

import copy
import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import CaptureError, UnsupportedModelError

log = logging.getLogger("polar_fx.capture")

_SDPA, _EAGER = "polar_fx_sdpa", "polar_fx_eager"
# Example sizes for tracing: distinct primes, so that no two axes are mistaken for one another.
_B, _T, _L = 3, 7, 23


@dataclass(frozen=True)
class KvSpec:
    """Geometry of one layer's slot: keys are [B, heads, L, key_size], values [B, heads, L, value_size]."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    def shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.heads, length, self.key_size), (batch, self.heads, length, self.value_size)

    def bytes_per_token(self) -> int:
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(frozen=True)
class CapturedModel:
    """A model as a flat FX graph.

    Placeholders: `input_ids` i64[B, T], `positions` i64[B, T] (per-row token positions, also the KV index
    each token writes), `kv_index` i64[L] (0 .. L-1), then `kv_<layer>_0` (keys) and `kv_<layer>_1` (values),
    written in place. Output: logits [B, T, V]. Weights are get_attr nodes holding the model's own tensors.
    """

    graph_module: GraphModule
    depth: int
    kv_specs: tuple[KvSpec, ...]
    layer_path: str
    seconds: float

    @property
    def device(self) -> torch.device:
        return next(self.graph_module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.graph_module.parameters() if p.is_floating_point())


# --------------------------------------------------------------------- the extension points of transformers


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Boolean mask [B, 1, T, L] from the model's own mask rule, with one position per row and token.

    `q_offset` is what our cache answers for the query offset: the positions [B, T] themselves.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() != 2 or mask_function is None or kv_offset != 0:
        raise CaptureError("the model computes its attention mask in a way that per-row positions cannot follow")
    device = q_offset.device
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    heads = torch.zeros(1, dtype=torch.long, device=device)[None, :, None, None]
    columns = torch.arange(kv_length, device=device)[None, None, None, :]
    mask = mask_function(rows, heads, q_offset[:, None, :, None], columns)
    return mask.expand(batch_size, -1, q_length, kv_length)


def _additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    mask = _mask(*args, **kwargs)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """The model's sdpa attention; on CPU grouped heads go to the kernel as they are.

    Expanding K and V to all heads first costs more than the attention itself when one token is decoded
    (96 against 36 microseconds at L = 528), and the CPU kernel computes the same bits without it.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    plain = not ({"position_bias", "cache", "softcap"} & {k for k, v in kwargs.items() if v is not None})
    if groups > 1 and plain and query.device.type == "cpu" and key.shape[1] * groups == query.shape[1]:
        result = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return result.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention a modeling file falls back to, under its conventional name."""
    source = sys.modules[type(module).__module__]
    forward = getattr(source, "eager_attention_forward", None)
    if forward is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function to trace", "load it with attn_implementation='sdpa'")
    return forward(module, *args, **kwargs)


def _register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(_SDPA, _sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_SDPA, _mask)
    ALL_ATTENTION_FUNCTIONS.register(_EAGER, _eager)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_EAGER, _additive_mask)


class _TracingCache(Cache):
    """Answers a model's questions about the past from per-row positions; `update` is for subclasses."""

    is_compileable = True

    def __init__(self, positions: Tensor, length: Any, depth: int) -> None:
        self.layers = []
        self.positions, self.length, self.depth = positions, length, depth

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.positions[:, :1]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.positions

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[Any, int]:
        return self.length, 0

    def __len__(self) -> int:
        return self.depth

    is_sliding = property(lambda self: [False] * self.depth)  # full-length slots: the window lives in the mask
    is_linear = property(lambda self: [False] * self.depth)
    is_dummy = property(lambda self: [False] * self.depth)
    is_initialized = property(lambda self: True)

    def _stateful(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "a layer keeps recurrent or convolutional state",
            "skipping or repeating such a layer has no defined meaning; use a pure attention model",
        )

    update_conv_state = update_recurrent_state = has_previous_state = _stateful


class _Recorder(_TracingCache):
    """Notes which layer stores which keys and values, in order."""

    def __init__(self, positions: Tensor, length: int, depth: int) -> None:
        super().__init__(positions, length, depth)
        self.calls: list[tuple[int, KvSpec]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        k, v = key_states, value_states
        self.calls.append((layer_idx, KvSpec(k.shape[1], k.shape[3], v.shape[3], k.dtype)))
        return k, v


class _Slots(_TracingCache):
    """Writes keys and values at the given positions of slots that are graph inputs; returns whole slots."""

    def __init__(self, positions: Tensor, kv_index: Tensor, kv: list[Tensor]) -> None:
        super().__init__(positions, kv_index.shape[0], len(kv) // 2)
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        rows = torch.arange(key_states.shape[0], device=key_states.device)[:, None]
        where = [rows, None, self.positions]
        written = [
            torch.ops.aten.index_put_(slot, where, states.transpose(1, 2))
            for slot, states in zip(self.kv[2 * layer_idx : 2 * layer_idx + 2], (key_states, value_states), strict=True)
        ]
        return written[0], written[1]


class _Traced(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, kv_index: Tensor, kv: list[Tensor]) -> Tensor:
        cache = _Slots(positions, kv_index, kv)
        # "no padding", for code that would otherwise make such a mask from a length it believes to be a number
        mask = torch.ones_like(kv_index).expand(input_ids.shape[0], -1)
        return self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits


# --------------------------------------------------------------------------------------- finding the layers


def attention_variants(model: PreTrainedModel) -> tuple[str, ...]:
    """Names under which the model's attention may be traced, the one it was loaded with first.

    Older modeling code compares the name with "sdpa" itself instead of asking for a function; it then takes its
    eager path, which needs an additive mask. Which variant is right is decided by running it.
    """
    loaded = model.config._attn_implementation
    names = {"sdpa": (_SDPA, _EAGER), "eager": (_EAGER,), None: (_EAGER,)}
    if loaded not in names:
        raise UnsupportedModelError(
            f"attention implementation {loaded!r} cannot be traced", "load the model with attn_implementation='sdpa' or 'eager'"
        )
    return names[loaded]


def shared_view(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A structural copy of the model that shares all tensors, in eval mode, with our attention functions."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, tensors)  # type: ignore[arg-type]
    view.eval()
    for module in view.modules():  # only the logits are wanted, whatever else the user's model hands out
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation_internal = attention
            config.return_dict, config.output_router_logits = True, False
    return view


def _find_stack(model: PreTrainedModel) -> str:
    """Dotted path of the ModuleList that holds the decoder layers."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    fits = [n for n, m in outermost.items() if len(m) == depth] or list(outermost)
    if not fits:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of layers (no nn.ModuleList)", "pass a decoder-only causal language model"
        )
    return max(fits, key=lambda n: sum(p.numel() for p in outermost[n].parameters()))


def check_supported(model: Any) -> None:
    """Raise UnsupportedModelError for what can be told without running the model."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}", "load one with polar_fx.load(...)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder", "pass a decoder-only causal language model"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no language-model head", "load it with AutoModelForCausalLM")
    devices = sorted({str(p.device) for p in model.parameters()})
    if devices == ["meta"] or len(devices) > 1:
        raise UnsupportedModelError(f"the weights of {type(model).__name__} are on {', '.join(devices)}", "load them all onto one device")
    hooked = sorted({n or "the model" for n, m in model.named_modules() for h in _hooks(m)})
    if hooked:
        raise UnsupportedModelError(f"{hooked[0]} has a forward hook, which a compiled graph would not run", "remove the hooks first")
    _find_stack(model)


def _hooks(module: nn.Module) -> list[Any]:
    """The user's hooks; transformers leaves some of its own behind, which do nothing unless it records outputs."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [h for h in hooks if not str(getattr(h, "__module__", "")).startswith("transformers.")]


class _ReadOnlyWeights(TorchDispatchMode):
    """Some models rescale their weights in their first forward pass; a view must not do that to the user's model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() in self.storages:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} changes its weights in its forward pass", "pass a model that only reads them"
            )
        return func(*args, **(kwargs or {}))


def _probe(view: PreTrainedModel, depth: int) -> tuple[KvSpec, ...]:
    """Run two tokens through the view and see that every layer stores keys and values of its own, once."""
    device = view.get_input_embeddings().weight.device
    positions = torch.arange(2, device=device)[None]
    recorder = _Recorder(positions, 2, depth)
    try:
        with torch.no_grad(), _ReadOnlyWeights(view):
            view(input_ids=torch.zeros_like(positions), position_ids=positions, past_key_values=recorder, use_cache=True)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(view).__name__} does not run with one KV slot per layer ({type(error).__name__}: {error})",
            "models with recurrent, convolutional or cross-layer state are not supported",
        ) from error
    stored = [layer for layer, _ in recorder.calls]
    if stored != list(range(depth)):
        silent = sorted(set(range(depth)) - set(stored))
        what = f"layers {silent} store no keys and values of their own" if silent else f"layers store KV in the order {stored}"
        raise UnsupportedModelError(
            f"{type(view).__name__}: {what} (shared KV, or recurrent state)",
            "skipping or repeating layers of such a model is unsound; use one where every layer owns its KV",
        )
    return tuple(spec for _, spec in recorder.calls)


# ------------------------------------------------------------------------------------------------- the trace


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals, and prints half a graph when it fails; neither helps a user."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _export(view: PreTrainedModel, specs: tuple[KvSpec, ...]) -> torch.export.ExportedProgram:
    device = view.get_input_embeddings().weight.device
    positions = torch.arange(_T, device=device) + torch.arange(_B, device=device)[:, None]
    kv = [torch.zeros(s, dtype=spec.dtype, device=device) for spec in specs for s in spec.shapes(_B, _L)]
    batch, tokens, length = torch.export.Dim("batch"), torch.export.Dim("tokens"), torch.export.Dim("length")
    rows = {0: batch, 1: tokens}
    shapes = (rows, rows, {0: length}, [{0: batch, 2: length}] * len(kv))
    example = (torch.zeros_like(positions), positions, torch.arange(_L, device=device), kv)
    with torch.no_grad(), _quiet():
        return torch.export.export(_Traced(view), example, dynamic_shapes=shapes, strict=False)


def _flatten(exported: torch.export.ExportedProgram, stack: str) -> GraphModule:
    """Exported program -> flat graph: weights become get_attr nodes, every node knows its layer."""
    signature = exported.graph_signature
    tensors: dict[str, Any] = {}
    graph = Graph()
    env: dict[Node, Node] = {}
    kinds = {s.arg.name: s for s in signature.input_specs}  # type: ignore[union-attr]
    in_layer = re.compile(rf"(?:^|\.)model\.{re.escape(stack)}\.(\d+)(?:\.|$)")
    num_kv = 0
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if node.name.startswith("kv_") and node.name != "kv_index":
                    layer, part = divmod(num_kv, 2)
                    num_kv += 1
                    new = graph.placeholder(f"kv_{layer}_{part}")
                    new.meta = {"role": "kv", "slot": layer, "part": part}
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
            raise UnsupportedModelError(f"the trace holds a nested graph ({node.target})", "data-dependent control flow is not supported")
        elif (buffer := _written(node)) is not None and env[buffer].op == "get_attr":
            if node.target is not torch.ops.aten.copy_.default or node is not next(iter(buffer.users)):
                raise UnsupportedModelError(f"the forward pass writes to {env[buffer].target}", "a model that keeps state between calls is not supported")
            env[node] = env[node.args[1]]  # computed anew by each call, as rotary frequencies may be: no write is needed
        else:
            env[node] = new = graph.node_copy(node, env.__getitem__)
            new.meta = {"val": node.meta.get("val"), "layer": _layer_of(node, in_layer)}
    return GraphModule(tensors, graph, class_name="Flat")


def _tensor(exported: torch.export.ExportedProgram, spec: Any) -> Tensor:
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        module_tensors = exported.state_dict
        return module_tensors[spec.target] if spec.target in module_tensors else exported.constants[spec.target]
    if spec.kind == InputKind.CONSTANT_TENSOR:
        return exported.constants[spec.target]
    raise UnsupportedModelError(f"the trace needs an input of kind {spec.kind}", "report this model")


def _written(node: Node) -> Node | None:
    """The value whose storage `node` writes to, seen through views; None for an operator that writes nothing."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return None
    while isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns):
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node


def _layer_of(node: Node, in_layer: re.Pattern[str]) -> int | None:
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if match := in_layer.search(path):
            return int(match[1])
    return None


def capture(model: PreTrainedModel, attention: str | None = None) -> CapturedModel:
    """Trace `model` into a flat FX graph; the model is neither changed nor copied.

    `attention` is one of `attention_variants(model)`, by default the first. `check.capture_checked` picks the
    variant that agrees with the model.

    Raises UnsupportedModelError for models whose layers cannot be skipped or repeated soundly and CaptureError
    when tracing itself fails; both say what to do.
    """
    start = time.perf_counter()
    check_supported(model)
    _register()
    stack = _find_stack(model)
    depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
    view = shared_view(model, attention or attention_variants(model)[0])
    specs = _probe(view, depth)
    try:
        exported = _export(view, specs)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export could not trace {type(model).__name__}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    flat = _flatten(exported, stack)
    seconds = time.perf_counter() - start
    log.info("captured %s: %d layers, %d nodes in %.1f s", type(model).__name__, depth, len(flat.graph.nodes), seconds)
    return CapturedModel(flat, depth, specs, stack, seconds)
