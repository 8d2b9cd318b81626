"""What a backend does: body graph + example operands -> region."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from ..passes.base import Pass
from ..region_names import ANY_SHAPE, RegionName, ShapeClass

__all__ = [
    "ANY_SHAPE",
    "Backend",
    "Dynamic",
    "PersistentBackend",
    "Region",
    "RegionName",
    "ShapeClass",
]

# Takes the body's operands as one list and returns its results as a sequence.
Region = Callable[[list[Tensor]], Sequence[Tensor]]

# Per operand, the axes whose size may vary, and which size that is ("batch" or "tokens").
Dynamic = Sequence[dict[int, str]]


class Backend(ABC):
    """Turns bodies into regions. `needs_shapes` says whether a region serves one shape class only.

    `options` are the compiler's own; `passes` run on each region's graph once its sizes are known.
    """

    name: ClassVar[str]
    needs_shapes: ClassVar[bool]
    by_address: bool = True  # whether it takes keys and values by address (ShapeClass)
    # whether its regions may run inside a CUDA graph for several tokens a row
    captures_prompts: ClassVar[bool] = True
    options: Mapping[str, Any]
    passes: tuple[Pass, ...]

    def __init__(
        self, options: Mapping[str, Any] | None = None, passes: Sequence[Pass] = ()
    ) -> None:
        self.options, self.passes = dict(options or {}), tuple(passes)

    @property
    def compiler(self) -> str:
        """What else decides the code and is no part of torch, for keys: a library, the machine it
        measured on.
        """
        return ""

    @abstractmethod
    def compile_region(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic
    ) -> Region:
        """A callable for the body on operands of the example's shape class; KV operands are written
        in place.
        """


class PersistentBackend(Backend):
    """A backend whose compiled regions are files: they can be stored, and loaded by another process
    in milliseconds.

    `in_workers` says that other processes may compile as well, several at once.
    """

    in_workers: ClassVar[bool] = True

    def compile_region(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic
    ) -> Region:
        with tempfile.TemporaryDirectory(prefix="polar_fx-") as place:
            self.export(body, example, dynamic, Path(place))
            self.build(Path(place))
            return self.load({p.name: p for p in Path(place).iterdir()})

    @abstractmethod
    def export(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic, folder: Path
    ) -> None:
        """Write the body's graph for one shape class into `folder`: all that `build` needs, no
        weights.
        """

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Compile the graph in `folder`, adding the compiled file.

        Runs in a worker process, too.
        """

    @abstractmethod
    def load(self, files: Mapping[str, Path]) -> Region:
        """The region from the files that `export` and `build` wrote, by name."""
