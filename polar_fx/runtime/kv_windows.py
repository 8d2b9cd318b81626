"""How many tokens back each layer looks: keys and values before that need not be held.

The model's own masks are asked, whatever made them: a layer has a window of w tokens if a token at
position p sees the columns from p - w + 1 on, wherever p is. What several layers read is held for
the one that looks back furthest.

Shape legend: B rows, L columns.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..library.symbols import Operand, Symbol, SymbolTable
from ..passes.address_kv import BLOCK
from ..program import Program

# Side values for one token a row at a position, of a row with so many columns.
Ask = Callable[[int, int], Sequence[Tensor]]

_FIRST = 32  # tokens; shorter rows are held whole
_BACK = (1, 2, 6)  # where a window is looked for, from the end: chunks are not taken for windows


class KvWindows:
    """The windows of a model's layers, found as rows grow."""

    def __init__(self, table: SymbolTable) -> None:
        self._masks = [_mask_of(table, layer) for layer in table.layers]
        self._windows: list[int | None] = [None] * len(table.layers)
        self._owners = table.owners
        self._looked = _FIRST

    def look(self, length: int, ask: Ask) -> None:
        """Find the windows that rows of `length` tokens may have left, if that is to be done."""
        while length >= self._looked:
            self._looked *= 2
            width = -(-self._looked // BLOCK) * BLOCK
            seen = [(width - back, ask(width - back, width)) for back in _BACK]
            of_mask: dict[int | None, int | None] = {None: None}
            for number in {mask for mask in self._masks if mask is not None}:
                of_mask[number] = _window([(at, values[number]) for at, values in seen])
            self._windows = [of_mask[mask] for mask in self._masks]
            for reader, owner in self._owners.items():
                own, other = self._windows[owner], self._windows[reader]
                self._windows[owner] = None if own is None or other is None else max(own, other)
                self._windows[reader] = None  # it holds nothing itself

    def steps(self, program: Program) -> dict[int, list[int]]:
        """The steps of a program that hold what is seen in a window alone, by its size."""
        found: dict[int, list[int]] = defaultdict(list)
        for step, layer in enumerate(program.path):
            if (window := self._windows[layer]) is not None:
                found[window].append(step)
        return found


def first_seen(length: int, window: int) -> int:
    """The first block that a token after `length` others sees."""
    return max(0, length - window + 1) // BLOCK


def _mask_of(table: SymbolTable, layer: Symbol) -> int | None:
    """The side value that is a layer's mask [.., T, L]; None unless there is exactly one such."""
    operands = [o for o in table.bodies[layer.target].operands if o.role in ("side", "input")]
    found = [n for n, o in zip(layer.sides, operands, strict=True) if _is_mask(o)]
    return found[0] if len(found) == 1 else None


def _is_mask(operand: Operand) -> bool:
    axes = operand.axes()
    last = len(operand.size) - 1
    return axes.get(last) == "length" and axes.get(last - 1) == "tokens"


def _window(seen: Sequence[tuple[int, Tensor]]) -> int | None:
    """The window of a mask [B, .., 1, L], given for one token at several positions; None if it
    differs, or if a token sees everything before it.
    """
    windows = set()
    for position, mask in seen:
        rows = mask.reshape(-1, mask.shape[-1])
        shown = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        first = int(shown.any(0).int().argmax())
        windows.add(position - first + 1 if first else None)
    return windows.pop() if len(windows) == 1 else None
