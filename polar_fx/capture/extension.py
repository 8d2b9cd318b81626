"""The public extension points of transformers through which unchanged modeling code is traced.

An attention function and a mask function registered under names of our own, and caches that answer
a model's questions about the past from per-row positions.

Shape legend: B batch, T tokens, L KV length, H KV heads, E head size.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import CaptureError, UnsupportedModelError
from .reasons import OtherStateError
from .row_values import Past

SDPA, EAGER = "polar_fx_sdpa", "polar_fx_eager"

# What models, their outputs and generation call the cache: the name changed in transformers 5.24.
CACHE = next(
    f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values")
)


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
    """Boolean mask [B, 1, T, L] from the model's own mask rule, with one position per row and
    token.

    `q_offset` is what our cache answers for the query offset: it knows the positions [B, T].
    Where no cache was asked and nothing is hidden the mask is empty: decoders make such a one for
    the tokens of an encoder, of which there are none here; attention with it is refused.
    """
    if mask_function is bidirectional_mask_function and not isinstance(q_offset, Past):
        return torch.empty(0, dtype=torch.bool)
    if not isinstance(q_offset, Past) or mask_function is None or kv_offset != 0:
        raise CaptureError(
            "the model computes its attention mask in a way that per-row positions cannot follow"
        )
    positions = q_offset.positions
    device = positions.device
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    heads = torch.zeros(1, dtype=torch.long, device=device)[None, :, None, None]
    columns = torch.arange(kv_length, device=device)[None, None, None, :]
    mask = mask_function(rows, heads, positions[:, None, :, None], columns)
    return mask.expand(batch_size, -1, q_length, kv_length)


def _additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    mask = _mask(*args, **kwargs)
    if _hides_nothing(mask):
        return mask
    return torch.where(
        mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min
    )


def _hides_nothing(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 1


def _only_chosen(mask: Tensor | None, chosen: Tensor | None) -> Tensor | None:
    """The mask [B, 1, T, L] with all hidden but the columns i[B, T, K] that a layer has chosen for
    each token, if it has.

    Modeling code does so itself only under the names "sdpa" and "eager", and else hands them on.
    """
    if chosen is None or mask is None:
        return mask
    shape = (*chosen.shape[:2], mask.shape[-1])
    hidden = torch.ones(shape, dtype=torch.bool, device=mask.device)
    hidden = hidden.scatter(-1, chosen.long(), False).unsqueeze(1)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _require_causal(module: nn.Module, mask: Tensor | None) -> None:
    """Raise UnsupportedModelError for attention in which nothing is hidden from a token."""
    if _hides_nothing(mask):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to the tokens after a token as well",
            "use a causal model; that of an encoder is made with is_decoder=True in its config",
        )


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The model's sdpa attention; grouped heads go to the kernel as they are where one takes them.

    Expanding K and V to all heads first costs more than the attention itself when one token is
    decoded (CPU: 96 against 36 microseconds at L = 528; H200, bf16, 24 heads in 8 groups: 84
    against 18 at L = 4,112). The CPU kernel computes the same bits without it. On a GPU only cuDNN
    and flash take groups, in half precision; float32 would fall back to plain products.
    """
    _require_causal(module, attention_mask)
    attention_mask = _only_chosen(attention_mask, kwargs.pop("indices", None))
    groups = getattr(module, "num_key_value_groups", 1)
    plain = not (
        {"position_bias", "cache", "softcap"} & {k for k, v in kwargs.items() if v is not None}
    )
    grouped = query.device.type == "cpu" or query.dtype in (torch.float16, torch.bfloat16)
    if groups > 1 and plain and grouped and key.shape[1] * groups == query.shape[1]:
        result = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=kwargs.get("scaling"),
            enable_gqa=True,
        )
        return result.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The attention a modeling file falls back to, under its conventional name."""
    _require_causal(module, attention_mask)
    attention_mask = _only_chosen(attention_mask, kwargs.pop("indices", None))
    source = sys.modules[type(module).__module__]
    forward = getattr(source, "eager_attention_forward", None)
    if forward is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager attention function to trace",
            "load it with attn_implementation='sdpa'",
        )
    return forward(module, query, key, value, attention_mask, **kwargs)


def register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(SDPA, _sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA, _mask)
    ALL_ATTENTION_FUNCTIONS.register(EAGER, _eager)
    ALL_MASK_ATTENTION_FUNCTIONS.register(EAGER, _additive_mask)


class _NoLayers(list[Any]):
    """Where other caches keep what a layer holds: modeling code that looks there wants more than
    keys and values.
    """

    def __getitem__(self, which: Any) -> Any:
        raise OtherStateError


class _TracingCache(Cache):
    """Answers a model's questions about the past from per-row positions; `update` is for
    subclasses.
    """

    is_compileable = True  # type: ignore[assignment]

    limit: int | None = None  # tokens of a row, at most

    def __init__(self, positions: Tensor, length: Any, *, depth: int) -> None:
        self.layers = _NoLayers()
        self.positions, self.length, self.depth = positions, length, depth
        self.places = positions  # where models look positions up

    def get_seq_length(self, layer_idx: int = 0) -> Past:
        return Past(self.places, self.limit)

    def get_query_offset(self, layer_idx: int = 0) -> Past:
        return Past(self.positions, self.limit)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[Any, int]:
        return self.length, 0

    def __len__(self) -> int:
        return self.depth

    # full-length slots: the window lives in the mask
    is_sliding = property(lambda self: [False] * self.depth)
    is_linear = property(lambda self: [False] * self.depth)
    is_dummy = property(lambda self: [False] * self.depth)
    is_initialized = property(lambda self: True)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _stateful(self, *args: Any, **kwargs: Any) -> Any:
        raise OtherStateError  # `probe` names the model and the remedy

    has_previous_state = _stateful


# What is kept under one number of the cache: keys and values, keys by which a layer chooses tokens,
# or a state by its kind and number.
Part = tuple[str, int]
KV: Part = ("kv", 0)
INDEX: Part = ("index", 0)


@dataclass(frozen=True)
class Running:
    """What runs: the class and the path of the innermost module, the layer of the stack that it is
    in, None outside of all, and how often that layer had run before.
    """

    kind: str
    path: str
    layer: int | None
    run: int


@dataclass(frozen=True)
class Store:
    """What was handed to the cache, under which number, and what ran then."""

    number: int
    part: Part
    tensors: tuple[Tensor, ...]
    by: Running


class Recorder(_TracingCache):
    """Notes what is stored, in order: keys and values [B, H, T, E], or a state; `running` is kept
    up to date by who runs the model.
    """

    def __init__(self, positions: Tensor, length: int, *, depth: int) -> None:
        super().__init__(positions, length, depth=depth)
        self.stores: list[Store] = []
        self.running = Running("", "", None, 0)

    def _note(self, number: int, part: Part, *tensors: Tensor) -> None:
        self.stores.append(Store(number, part, tensors, self.running))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self._note(layer_idx, KV, key_states, value_states)
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        self._note(layer_idx, INDEX, indexer_key_states[:, None])
        return indexer_key_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: no token came before."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: no token came before."""

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if conv_kernel_size is None:  # how many inputs are kept cannot be told from those of two
            raise OtherStateError
        kept = conv_states.new_empty(*conv_states.shape[:-1], conv_kernel_size)
        self._note(layer_idx, ("conv", state_idx), kept)
        missing = max(0, conv_kernel_size - conv_states.shape[-1])
        return nn.functional.pad(conv_states, (missing, 0))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self._note(layer_idx, ("recurrent", state_idx), recurrent_states)
        return recurrent_states


class Slots(_TracingCache):
    """Writes to slots that are graph inputs: keys and values at the given positions, states over
    those that were there.

    `parts` are the tensors under each number of the cache by what they are, `places` the positions
    that the model looks up. Tokens at the last position are padding, after a row's own: they leave
    states as they are, if there are any.
    """

    real: Tensor  # bool[B, T]: false at padding

    def __init__(
        self,
        positions: Tensor,
        kv_index: Tensor,
        *,
        places: Tensor,
        parts: list[dict[Part, list[Tensor]]],
    ) -> None:
        super().__init__(positions, kv_index.shape[0], depth=len(parts))
        self.places = places
        self.parts = parts
        if any(part not in (KV, INDEX) for own in parts for part in own):
            self.real = positions != kv_index[-1:]
        # the recurrent state that a layer asked for last, and how many scans went on from it
        self.state: Tensor | None = None
        self.scans = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        written = self._written(layer_idx, KV, new=(key_states, value_states))
        return written[0], written[1]

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """All keys [B, L, E] by which a layer chooses tokens, after new ones [B, T, E]."""
        return self._written(layer_idx, INDEX, new=[indexer_key_states[:, None]])[0].squeeze(1)

    def _written(self, layer_idx: int, part: Part, *, new: Sequence[Tensor]) -> list[Tensor]:
        """A part of a slot, its tensors [B, H, L, E], after new tokens [B, H, T, E]."""
        rows = torch.arange(new[0].shape[0], device=new[0].device)[:, None]
        where = [rows, None, self.positions]
        return [
            torch.ops.aten.index_put_(slot, where, states.transpose(1, 2))
            for slot, states in zip(self.parts[layer_idx][part], new, strict=True)
        ]

    def _state(self, layer_idx: int, part: Part) -> Tensor | None:
        found = self.parts[layer_idx].get(part)
        return None if found is None else found[0]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._state(layer_idx, ("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self.state, self.scans = self._state(layer_idx, ("recurrent", state_idx)), 0
        return self.state

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """The inputs kept from before and the new ones [B, C, K + T]."""
        (slot,) = self.parts[layer_idx]["conv", state_idx]
        whole = torch.cat((slot, conv_states), -1)
        # the last inputs of a row are those that end with its own last token
        kept = torch.arange(slot.shape[-1], device=slot.device) + self.real.sum(1, keepdim=True)
        slot.copy_(whole.gather(-1, kept[:, None].expand(-1, whole.shape[1], -1)))
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        (slot,) = self.parts[layer_idx]["recurrent", state_idx]
        return slot.copy_(recurrent_states)
