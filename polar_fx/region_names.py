"""Names of regions: which body, for which class of shapes. Without torch, so that bundles can be
looked at without it.
"""

import re
from dataclasses import dataclass

_KV_WRITES = ".kv"
_SHAPE = re.compile(r"B=(1|2\+) T=(1|2\+) L=(any|0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class ShapeClass:
    """The shapes one region serves. None means any size from 2 up, without compiling again.

    One token and one row are classes of their own because decoding one row is where the time goes.
    `length` is the allocated KV length; None means keys and values by address (see
    passes/address_kv.py), any number of blocks of a store of any size.
    """

    batch: int | None
    tokens: int | None
    length: int | None

    @classmethod
    def of(cls, batch: int, tokens: int, length: int | None) -> "ShapeClass":
        return cls(1 if batch == 1 else None, 1 if tokens == 1 else None, length)

    @property
    def decode(self) -> "ShapeClass":
        """The class of one token a row."""
        return ShapeClass(self.batch, 1, self.length)

    def __str__(self) -> str:
        length = "any" if self.length is None else self.length
        return f"B={self.batch or '2+'} T={self.tokens or '2+'} L={length}"

    @classmethod
    def parse(cls, text: str) -> "ShapeClass":
        """Inverse of `str`. Raises ValueError."""
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no class of shapes, such as 'B=1 T=2+ L=64'")
        batch, tokens = (1 if size == "1" else None for size in found.groups()[:2])
        return cls(batch, tokens, None if found[3] == "any" else int(found[3]))

    @property
    def varying(self) -> tuple[str, ...]:
        """The sizes that a call chooses."""
        sizes = {"batch": self.batch, "tokens": self.tokens, "length": self.length}
        return (*(n for n, s in sizes.items() if s is None), "blocks", "pool")


# Of code that serves every shape.
ANY_SHAPE = ShapeClass(None, None, 0)


@dataclass(frozen=True, slots=True)
class RegionName:
    """Which region: the code of a body for one shape class; with `kv_writes`, of what writes the
    body's keys and values alone (see passes/keep_kv_writes.py).

    `str` gives "layer_kind_0.kv for B=1 T=2+ L=64", and `parse` reads it.
    """

    body: str
    shape: ShapeClass
    kv_writes: bool = False

    @property
    def graph(self) -> str:
        """The name without its shapes: of the graph that is compiled."""
        return self.body + _KV_WRITES * self.kv_writes

    def __str__(self) -> str:
        return f"{self.graph} for {self.shape}"

    @classmethod
    def of(cls, graph: str, shape: ShapeClass) -> "RegionName":
        """The name of that `graph` and shape. Raises ValueError."""
        body = graph.removesuffix(_KV_WRITES)
        if not body or "." in body:
            raise ValueError(f"{graph!r} is no region's name, such as 'layer_kind_0.kv'")
        return cls(body, shape, body != graph)

    @classmethod
    def parse(cls, text: str) -> "RegionName":
        """Inverse of `str`. Raises ValueError."""
        graph, _, shape = text.partition(" for ")
        return cls.of(graph, ShapeClass.parse(shape))
