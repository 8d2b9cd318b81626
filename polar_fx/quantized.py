"""Weights held as integers: a model's linear layers in int8 or int4.

int8: a scale for each row of a weight. int4: a scale and a zero for each group of 32 numbers in a
row, two numbers a byte; the head, and what 32 does not divide the rows of, is int8. Scales and
zeros have the model's dtype, and integers are chosen for them as they are rounded.
`passes/quantized_linear.py` says how integers stand for numbers.

Shape legend: N rows of a weight, K their size, G groups of 32 numbers in a row.
"""

import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .errors import InputError, ModelWarning, UnsupportedModelError
from .output.suggestions import did_you_mean
from .passes.quantized_linear import GROUP, dequantize

Quantize = Literal["int8", "int4"]
WAYS: tuple[str, ...] = get_args(Quantize)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight [N, K] is held as integers.

    `integers` int8[N, K] and `scale` [N, 1]; or `integers` uint8[N, K / 2], and `scale` and `zero`
    [N, G, 1].
    """

    def __init__(self, integers: tuple[Tensor, ...], bias: nn.Parameter | None) -> None:
        super().__init__()
        whole, scale, *zero = (nn.Parameter(part, requires_grad=False) for part in integers)
        self.integers, self.scale, self.bias = whole, scale, bias
        self.zero = zero[0] if zero else None
        size = whole.shape[1] * (2 if zero else 1)
        self.in_features, self.out_features = size, whole.shape[0]

    @property
    def weight(self) -> Tensor:
        """The numbers [N, K] that the integers stand for: models ask for their dtype and shape."""
        return dequantize(self.integers, self.scale, self.zero)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.integers.dtype}"


class QuantizedEmbedding(nn.Module):
    """A table of embeddings that is the head's weight as well: int8[V, K], and `scale` [V, 1]."""

    def __init__(self, head: QuantizedLinear) -> None:
        super().__init__()
        self.weight, self.scale = head.integers, head.scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids i64[...] -> [..., K]"""
        return dequantize(self.weight[ids], self.scale[ids])


def checked_way(quantize: str | None) -> None:
    """Raise InputError for a way that is unknown."""
    if quantize is not None and quantize not in WAYS:
        raise InputError(
            f"unknown quantize {quantize!r}; use {' or '.join(WAYS)}"
            f"{did_you_mean(str(quantize), WAYS)}"
        )


@torch.no_grad()
def quantize_weights(model: PreTrainedModel, quantize: str) -> PreTrainedModel:
    """The model, its linear layers with weights as integers; they are replaced in place, one after
    another.

    What is no plain `nn.Linear`, such as the experts of a mixture held in one tensor, stays as it
    is, with a ModelWarning if that is most of the layers. Raises InputError for a way that is
    unknown, and UnsupportedModelError for a model that is quantized already or whose layers have no
    linear layer.
    """
    checked_way(quantize)
    kinds = [(p, is_traceable_wrapper_subclass(p)) for p in model.parameters()]
    if any(wrapped or not p.is_floating_point() for p, wrapped in kinds):
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are quantized already", "leave quantize out"
        )
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {id(end.weight) for end in (head, table) if isinstance(end, nn.Module)}
    found = {id(linear): linear for _, _, linear in _linears(model)}
    _check_share(model, [m.weight for m in found.values() if m is not head], ends=ends)
    tied = head is not None and head.weight is getattr(table, "weight", None)
    made: dict[int, QuantizedLinear] = {}
    for parent, name, linear in list(_linears(model)):
        if id(linear) not in made:
            way = "int8" if linear is head else quantize
            made[id(linear)] = QuantizedLinear(integers_of(linear.weight, way), linear.bias)
        setattr(parent, name, made[id(linear)])
    if tied and type(table) is nn.Embedding and id(head) in made:
        model.set_input_embeddings(QuantizedEmbedding(made[id(head)]))
    return model


def _check_share(model: PreTrainedModel, weights: list[Tensor], *, ends: set[int]) -> None:
    """Warn if the weights to be quantized are the smaller part of the layers', whose tables and
    head are `ends`. Raises UnsupportedModelError if there are none.
    """
    every = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    share = sum(w.numel() for w in weights) / max(1, every)
    if share == 0:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} have no torch.nn.Linear to quantize",
            "leave quantize out",
        )
    if share < 0.5:
        warnings.warn(
            f"{share:.0%} of the weights in the layers of {type(model).__name__} are those of "
            "torch.nn.Linear and are quantized; the others stay as they are",
            ModelWarning,
            stacklevel=3,
        )


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every plain linear layer, the module that holds it, and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def integers_of(weight: Tensor, quantize: str) -> tuple[Tensor, ...]:
    """The weight [N, K] as what `dequantize` takes (passes/quantized_linear.py)."""
    size, dtype = weight.shape[1], weight.dtype
    if quantize == "int4" and size % GROUP == 0:
        return _nibbles(weight)
    wide = weight.float()
    scale = _step(wide.abs().amax(1, keepdim=True) / 127, dtype)
    numbers = (wide / scale.float()).round().clamp(-127, 127)
    return numbers.to(torch.int8), scale


def _nibbles(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale, zero = _step((high - low) / 15, weight.dtype), low.to(weight.dtype)
    numbers = ((groups - zero.float()) / scale.float()).round().clamp(0, 15)
    low_half, high_half = numbers.to(torch.uint8).view(len(weight), -1, 2).unbind(2)
    return low_half | high_half << 4, scale, zero


def _step(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps between numbers, in that dtype; 1 where all numbers are equal."""
    step = size.to(dtype)
    return torch.where(step > 0, step, torch.ones_like(step))
