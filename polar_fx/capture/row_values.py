"""Positions that differ from row to row, in the hands of code that thinks of one row.

Models ask their cache how many tokens came before, and make positions of a number: one for all
rows of a batch. Our cache answers with a `Past`. What code makes of it are `RowValues`: to the code
[T, ...], as it expects, with an axis of rows before these that it does not see. Where it gives them
an axis of its own for the rows, of size one, that is where they go, and the rest is a tensor.

Shape legend: B batch, T tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .reasons import RowLengthError


class Past:
    """How many tokens of each row came before, and `more`: a number in the hands of the code.

    With the new tokens it is `limit` at most, where that is given.
    """

    def __init__(self, positions: Tensor, limit: int | None, *, more: Any = 0) -> None:
        self.positions, self.limit, self.more = positions, limit, more

    def _plus(self, other: Any) -> Any:
        if not isinstance(other, (Tensor, RowValues)):
            return Past(self.positions, self.limit, more=self.more + other)
        tokens = self.positions.shape[1]
        if isinstance(other, Tensor) and other.dim() == 1 and other.shape[0] == tokens:
            # the numbers of the new tokens, from wherever they are counted
            counted = other - torch.arange(tokens, device=other.device)
            return RowValues(self.positions + self.more + counted)
        return self.positions[:, :1] + self.more + other

    __add__ = __radd__ = _plus

    def __sub__(self, other: Any) -> Any:
        return self._plus(-other)

    def __gt__(self, other: Any) -> bool:
        """Known where no row comes so far, as if code asks whether a table is long enough."""
        if self.limit is None or self.limit + self.more - self.positions.shape[1] > other:
            raise RowLengthError
        return False

    def _unknown(self, *args: Any) -> Any:
        raise RowLengthError

    __bool__ = __int__ = __index__ = __eq__ = __ne__ = _unknown  # type: ignore[assignment]
    __lt__ = __le__ = __ge__ = __rsub__ = _unknown
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add) and not kwargs:
            past, other = args if isinstance(args[0], cls) else reversed(args)
            return past._plus(other)
        if func is torch.arange and len(args) == 2 and all(isinstance(a, cls) for a in args):
            start, stop = args
            if stop.more - start.more == start.positions.shape[1]:
                dtype = (kwargs or {}).get("dtype") or torch.long
                return RowValues((start.positions + start.more).to(dtype))
        raise RowLengthError


class RowValues:
    """A tensor [B, *shape] that is one [*shape] of each row to the code which computes with it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def shape(self) -> torch.Size:
        return self.value.shape[1:]

    @property
    def ndim(self) -> int:
        return self.value.dim() - 1

    def dim(self) -> int:
        return self.ndim

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def view(self, *sizes: Any) -> "Tensor | RowValues":
        """Rows take the first axis if its size is one."""
        first, *rest = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
        rows = self.value.shape[0]
        if rest and isinstance(first, int) and first == 1:
            return self.value.reshape(rows, *rest)
        return RowValues(self.value.reshape(rows, first, *rest))

    reshape = view

    def unsqueeze(self, axis: int) -> "Tensor | RowValues":
        """Rows take an axis in front."""
        if axis in (0, -self.ndim - 1):
            return self.value
        return RowValues(self.value.unsqueeze(axis + 1 if axis > 0 else axis))

    def expand(self, *sizes: Any) -> "Tensor | RowValues":
        """Rows take an axis in front."""
        wanted = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
        if len(wanted) > self.ndim:
            return self._of_rank(len(wanted)).expand(wanted)
        return RowValues(self.value.expand(-1, *wanted))

    def __getitem__(self, which: Any) -> "Tensor | RowValues":
        """Rows take an axis in front."""
        own = which if isinstance(which, tuple) else (which,)
        if own[0] is None:
            return self.value[(slice(None), *own[1:])]
        return RowValues(self.value[(slice(None), *own)])

    def _unknown(self, *args: Any) -> Any:
        raise RowLengthError

    __bool__ = __int__ = __index__ = __float__ = _unknown
    __hash__ = None  # type: ignore[assignment]

    def _of_rank(self, rank: int) -> Tensor:
        return self.value[(slice(None), *(None,) * (rank - self.value.dim()))]

    def __getattr__(self, name: str) -> Any:
        found = getattr(Tensor, name)
        if callable(found):
            return partial(_of_each_row, found, self)
        return getattr(self.value, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        own: Callable[..., Any] | None = vars(cls).get(getattr(func, "__name__", ""))
        if own is not None and isinstance(args[0], cls):
            return own(*args, **(kwargs or {}))
        return _of_each_row(func, *args, **(kwargs or {}))


# What computes along axes, or moves them; rows are an axis in front of those that code counts.
_AXES = (
    "all amax amin any argmax argmin argsort cat chunk concat concatenate cumprod cumsum diff "
    "flatten flip gather index_select logsumexp max mean median min movedim narrow norm permute "
    "prod roll scatter softmax sort split squeeze stack std sum swapaxes t topk transpose tril "
    "triu unbind unflatten var T"
)
_ALONG_AXES = frozenset(_AXES.split())


def _of_each_row(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator on each element, or a look-up of each: a tensor if it meets one with rows.

    Raises RowLengthError for one along axes, unless they are counted from the last.
    """
    given = tree_flatten(args)[0]
    if getattr(func, "__name__", "").strip("_") in _ALONG_AXES:
        numbers = [a for a in (*given, *tree_flatten(kwargs)[0]) if type(a) is int]
        if not numbers or max(numbers) >= 0:
            raise RowLengthError
    if any(isinstance(a, RowValues) for a in tree_flatten(kwargs)[0]):
        raise RowLengthError
    rank = max(a.value.dim() for a in given if isinstance(a, RowValues))
    looks_up = func is torch.nn.functional.embedding
    others = [a.dim() for a in given if isinstance(a, Tensor)] if not looks_up else []
    widest = max((rank, *others))
    plain = tree_map(lambda a: a._of_rank(widest) if isinstance(a, RowValues) else a, args)
    found = func(*plain, **kwargs)
    if max(others, default=0) >= rank:
        return found
    return tree_map(lambda a: RowValues(a) if isinstance(a, Tensor) else a, found)


def _operator(name: str) -> Callable[..., Any]:
    def method(self: RowValues, *others: Any) -> Any:
        return _of_each_row(getattr(Tensor, name), self, *others)

    return method


_ARITHMETIC = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv pow neg eq ne lt le gt ge and or invert"
)
for _name in _ARITHMETIC.split():
    setattr(RowValues, f"__{_name}__", _operator(f"__{_name}__"))
