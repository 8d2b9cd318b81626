"""Rotary frequencies that depend on the longest position, in a form a graph can hold.

transformers calls this "longrope": one set of frequencies while every position is below the length
the model was first trained for, another set beyond it. Its older releases choose with an `if`, for
which tracing would need the positions themselves; here both sets are there, and an operator
chooses.
"""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def choose_frequencies_by_operator(view: nn.Module) -> None:
    """Let the longrope modules of a view (never of the user's model) choose their frequencies
    without an `if`.
    """
    for module in view.modules():
        kinds = getattr(module, "rope_type", None)
        layer_types = (
            [t for t, kind in kinds.items() if kind == "longrope"]
            if isinstance(kinds, dict)
            else []
        )
        if kinds == "longrope":
            layer_types = [None]
        if layer_types:
            module.forward = MethodType(_choosing(module, layer_types), module)


def _choosing(module: nn.Module, layer_types: list[Any]) -> Any:
    """The module's own forward pass without transformers' decorator, after the choice of
    frequencies.
    """
    decorated = type(module).forward
    inner = inspect.unwrap(decorated)
    long = {layer_type: _long_frequencies(module, layer_type) for layer_type in layer_types}

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        named = () if layer_type is None else (layer_type,)
        if layer_type not in long:
            return decorated(self, x, position_ids, *named)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        beyond = position_ids.max() + 1 > _first_length(self, layer_type)
        short = getattr(self, f"{name.removesuffix('inv_freq')}original_inv_freq")
        setattr(self, name, torch.where(beyond, long[layer_type].to(x.device), short.to(x.device)))
        return inner(self, x, position_ids, *named)

    return forward


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _first_length(module: Any, layer_type: str | None) -> int:
    return _parameters(module, layer_type)["original_max_position_embeddings"]


def _long_frequencies(module: Any, layer_type: str | None) -> Tensor:
    device = next(module.buffers()).device
    length = _first_length(module, layer_type) + 1
    return ROPE_INIT_FUNCTIONS["longrope"](
        module.config, device, seq_len=length, layer_type=layer_type
    )[0]
