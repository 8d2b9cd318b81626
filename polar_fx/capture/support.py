"""What can be captured: the layer stack, the attention to trace, and what positions there are."""

import contextlib
import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd.subclass_parametrization import (
    unwrap_tensor_subclass_parameters,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .extension import EAGER, SDPA

_MORE_ROWS = 16  # a table of positions may have: OPT's begins at 2


def attention_variants(model: PreTrainedModel) -> tuple[str, ...]:
    """Names under which the model's attention may be traced, the one it was loaded with first.

    Older modeling code compares the name with "sdpa" itself instead of asking for a function; it
    then takes its eager path, which needs an additive mask. Which variant is right is decided by
    running it.
    """
    loaded = model.config._attn_implementation
    names = {"sdpa": (SDPA, EAGER), "eager": (EAGER,), None: (EAGER,)}
    if loaded not in names:
        raise UnsupportedModelError(
            f"attention implementation {loaded!r} cannot be traced",
            "load the model with attn_implementation='sdpa' or 'eager'",
        )
    return names[loaded]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding [V, d]: its device is where token ids go, its length the number of
    ids.
    """
    return cast(Tensor, model.get_input_embeddings().weight)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside it torch.autocast is off: graphs are traced and run in the types of the model's own
    weights.
    """
    # asked first: of a device that autocast does not know, such as "meta", the second question
    # raises
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def shared_view(model: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    """A structural copy of the model that shares all tensors, in eval mode, with our attention
    functions.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, tensors)  # type: ignore[arg-type]
    view.eval()
    # only the logits are wanted, whatever else the user's model hands out
    for module in view.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation_internal = attention
            config.return_dict, config.output_router_logits = True, False
    return view


def unwrapped(view: PreTrainedModel) -> PreTrainedModel:
    """The view with weights that are tensor subclasses (quantized ones) as the plain tensors they
    are made of.

    Traced so, scales and integers are weights like any other, and dequantizing is part of the
    graph.
    """
    if any(is_traceable_wrapper_subclass(p) for p in view.parameters()):
        unwrap_tensor_subclass_parameters(view)
    return view


def give_layers_modules_of_their_own(layers: nn.Module) -> None:
    """Copy modules that an earlier layer of a view holds as well; tensors stay shared.

    Operators know their layer by the path of the module they ran in, which has to be one alone.
    """
    seen: set[int] = set()
    for name, layer in list(layers.named_children()):
        if any(id(m) in seen for m in layer.modules()):
            tensors = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
            layer = copy.deepcopy(layer, tensors)  # type: ignore[arg-type]
            setattr(layers, name, layer)
        seen |= {id(m) for m in layer.modules()}


def find_stack(model: PreTrainedModel) -> str:
    """Dotted path of the ModuleList that holds the decoder layers."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0
    }
    inside_one = tuple(f"{name}." for name in lists)
    outermost = {n: m for n, m in lists.items() if not n.startswith(inside_one)}
    fits = [n for n, m in outermost.items() if len(m) == depth] or list(outermost)
    # of a model that also sees or hears, the text model's own layers, whatever else is as deep
    own = (
        {id(m) for m in decoder.modules()}
        if isinstance(decoder := model.get_decoder(), nn.Module)
        else set()
    )
    fits = [n for n in fits if id(outermost[n]) in own] or fits
    if not fits:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of layers (no nn.ModuleList)",
            "pass a decoder-only causal language model",
        )
    return max(fits, key=lambda n: sum(p.numel() for p in outermost[n].parameters()))


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens of a row the model was built for; None if its configuration names no number,
    or one such as -1.
    """
    limit = _limit(model.config)
    return None if limit is None else limit - first_position(model)


def _limit(config: Any) -> int | None:
    try:
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    except NotImplementedError:  # so say configurations of models without a limit
        return None
    return int(limit) if limit is not None and limit > 0 else None


def last_position(model: PreTrainedModel) -> int | None:
    """The last position a model can look up, if it keeps a table of them, learned or computed
    ahead; None if it needs none.

    A table is known by its length: that of the config, or a few rows more. To take something else
    for one costs an operator.
    """
    limit = _limit(model.config)
    if limit is None:
        return None
    if _position_tables(model):
        return limit - 1 - first_position(model)
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            own = (*module._buffers.values(), *vars(module).values())
            found = any(
                isinstance(t, Tensor) and t.dim() > 1 and limit <= t.shape[-2] < limit + _MORE_ROWS
                for t in own
            )
            if found:
                return limit - 1
    return None


def _position_tables(model: PreTrainedModel) -> list[nn.Embedding]:
    """The tables of positions that a model has learned."""
    limit = _limit(model.config)
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and limit is not None
        and module is not model.get_input_embeddings()
        and limit <= module.num_embeddings < limit + _MORE_ROWS
    ]


def first_position(model: PreTrainedModel) -> int:
    """What a model calls the position of a row's first token.

    Where a learned table has a place for padding, positions of tokens begin after it: so count
    models of RoBERTa's kind, from the tokens, unless they are given positions.
    """
    tables = _position_tables(model)
    return max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)


def check_supported(model: Any) -> None:
    """Raise UnsupportedModelError for what can be told without running the model."""
    if hasattr(model, "merge_and_unload"):  # as PEFT's models have
        raise UnsupportedModelError(
            f"a {type(model).__name__} keeps its adapter apart from the weights",
            "compile polar_fx.merged(model), a copy with the adapter in its weights",
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}",
            "load one with polar_fx.load(...)",
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder",
            "pass a decoder-only causal language model",
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head",
            "load it with AutoModelForCausalLM",
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if devices == ["meta"] or len(devices) > 1:
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are on {', '.join(devices)}",
            "load them all onto one device",
        )
    hooked = sorted({n or "the model" for n, m in model.named_modules() for h in _hooks(m)})
    if hooked:
        raise UnsupportedModelError(
            f"{hooked[0]} has a forward hook, which a compiled graph would not run",
            "remove the hooks first",
        )
    replaced = [
        n
        for n, m in model.named_modules()
        if hasattr(vars(m).get("forward"), "_torchdynamo_orig_callable")
    ]
    if replaced:
        path = f"model.{replaced[0]}" if replaced[0] else "model"
        raise UnsupportedModelError(
            f"forward of {replaced[0] or 'the model'} was replaced by torch.compile",
            f"compile the model as it was loaded: delete the attribute (del {path}.forward), or "
            "load the model again",
        )
    find_stack(model)


def _hooks(module: nn.Module) -> list[Any]:
    """The user's hooks; transformers leaves some of its own behind, which do nothing unless it
    records outputs.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [h for h in hooks if not str(getattr(h, "__module__", "")).startswith("transformers.")]
