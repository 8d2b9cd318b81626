"""Rotary frequencies that depend on how long a row is, in a form a graph can hold.

transformers asks for the largest position of a whole batch. Of "longrope", one set of frequencies
serves rows up to the length the model was first trained for, another set those beyond it: here
both are in the graph, and every row has the one of its own length. "dynamic" frequencies change
beyond the positions the model was built for, where no row is run.

Shape legend: B batch, T tokens, d rotary size.
"""

import inspect
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LARGEST = (torch.max, torch.amax, Tensor.max, Tensor.amax)


def frequency_switch(config: Any) -> int | None:
    """The most tokens a row may have before the model of this HuggingFace configuration takes other
    rotary frequencies for all of it; None if it never does.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    switches = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min((s for s in switches if s), default=None)


def choose_frequencies_by_row(view: nn.Module) -> bool:
    """Let the rotary modules of a view (never of the user's model) choose their frequencies for
    each row, and without an `if`; whether any of them chooses.
    """
    chooses = False
    for module in view.modules():
        longer, fixed = (_layer_types(module, kind) for kind in ("longrope", "dynamic"))
        if longer or fixed:
            module.forward = MethodType(_by_row(module, longer, fixed=fixed), module)
        chooses = chooses or bool(longer)
    return chooses


def _layer_types(module: Any, kind: str) -> list[str | None]:
    """The layer types whose frequencies are of this kind; [None] if all are, without types."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return [t for t, k in kinds.items() if k == kind]
    return [None] if kinds == kind else []


class _LastPosition(TorchFunctionMode):
    """Answers a module that asks for the largest position of a batch, such as one that scales its
    tables by it.
    """

    def __init__(self, position_ids: Tensor, last: int) -> None:
        super().__init__()
        self.position_ids, self.last = position_ids, last

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        asks = func in _LARGEST and len(args) == 1 and not kwargs
        return self.last if asks and args[0] is self.position_ids else func(*args, **(kwargs or {}))


def _by_row(module: nn.Module, longer: list[str | None], *, fixed: list[str | None]) -> Any:
    """The module's own forward pass without transformers' decorator, with frequencies that do not
    depend on other rows.
    """
    decorated = type(module).forward
    inner = inspect.unwrap(decorated)
    long = {layer_type: _long_frequencies(module, layer_type) for layer_type in longer}

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        named = () if layer_type is None else (layer_type,)
        if layer_type not in (*longer, *fixed):
            return decorated(self, x, position_ids, *named)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        short = getattr(self, f"{name.removesuffix('inv_freq')}original_inv_freq")

        def tables(frequencies: Tensor, last: int | None = None) -> Any:
            """Cosines and sines [B, T, d]; of rows whose last position is this one, if given."""
            before = getattr(self, name)
            self._buffers[name] = frequencies.to(before)  # as transformers copies them there
            try:
                with nullcontext() if last is None else _LastPosition(position_ids, last):
                    return inner(self, x, position_ids, *named)
            finally:
                self._buffers[name] = before

        if layer_type in fixed:
            return tables(short)
        length = _first_length(self, layer_type)
        beyond = position_ids.amax(-1)[:, None, None] >= length
        near, far = tables(short, length - 1), tables(long[layer_type], length)
        return tuple(torch.where(beyond, b, a) for a, b in zip(near, far, strict=True))

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
