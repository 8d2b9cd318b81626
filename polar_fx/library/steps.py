"""How a program's steps run: which operands a call takes, and how blends open and close.

Linked regions, whole programs, verdicts by teacher forcing and exported graphs all follow this one
rule. The interpreted step graph, which they are tested against, does not use it.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

# The side values are the three graph inputs (ids, positions, KV columns), then the prologue's
# results. The first of these is the hidden state before the first step.
HIDDEN = 3


def operands(
    hidden: T, values: Sequence[T], sides: Sequence[int], slot: Sequence[T], weights: Sequence[T]
) -> list[T]:
    """What a call takes, in order: hidden state, its side values, keys and values, weights.

    Prologue and epilogue have no slot.
    """
    return [hidden, *[values[i] for i in sides], *slot, *weights]


class Blends(Generic[T]):
    """The hidden states that open blends wait for, the last one opened at the end.

    A blend takes the hidden state h before it and the state g after it to h + damping (g - h);
    `lerp` computes that: `torch.lerp` for tensors.
    """

    __slots__ = ("lerp", "saved")

    def __init__(self, lerp: Callable[[T, T, float], T], saved: Sequence[T] = ()) -> None:
        self.lerp, self.saved = lerp, list(saved)

    def open(self, hidden: T, count: int) -> None:
        """Open `count` blends at the hidden state before a step."""
        self.saved += [hidden] * count

    def close(self, hidden: T, dampings: Sequence[float]) -> T:
        """The hidden state after a step, once the innermost blends, one a damping, are closed."""
        for damping in dampings:
            hidden = self.lerp(self.saved.pop(), hidden, damping)
        return hidden

    def each(self, function: Callable[[T], T]) -> "Blends[T]":
        """The same blends over other states, such as those of fewer tokens."""
        return Blends(self.lerp, [function(state) for state in self.saved])
