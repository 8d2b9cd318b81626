"""What a backend does: body graph + example operands -> region."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

Region = Callable[..., Any]


@dataclass(frozen=True)
class ShapeClass:
    """The shapes one region serves. None means any size from 2 up, without compiling again.

    One token and one row are classes of their own because decoding one row is where the time goes.
    `length` is the allocated KV length.
    """

    batch: int | None
    tokens: int | None
    length: int

    @classmethod
    def of(cls, batch: int, tokens: int, length: int) -> "ShapeClass":
        return cls(1 if batch == 1 else None, 1 if tokens == 1 else None, length)

    def __str__(self) -> str:
        return f"B={self.batch or '2+'} T={self.tokens or '2+'} L={self.length}"


@dataclass(frozen=True)
class RegionRecord:
    """One compilation: which body, for which shapes, how long it took."""

    body: str
    shapes: str
    seconds: float


class Backend(ABC):
    """Turns bodies into regions. `needs_shapes` says whether a region serves one shape class only."""

    name: ClassVar[str]
    needs_shapes: ClassVar[bool]

    @abstractmethod
    def compile_region(self, body: GraphModule, example: Sequence[Tensor], dynamic: Sequence[dict[int, str]]) -> Region:
        """A callable with the body's calling convention.

        `example` are operands of the shape class; `dynamic` names, per operand, the axes whose size may vary
        ("batch" or "tokens", sizes from 2 up). KV operands are written in place, by the example call too.
        """
