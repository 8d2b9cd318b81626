"""The interpreter as a backend: bodies run as they were traced, operator by operator."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from .base import Backend, Dynamic, Region


class EagerBackend(Backend):
    """No compilation; exact, and the reference for every other backend."""

    name: ClassVar[str] = "eager"
    needs_shapes: ClassVar[bool] = False

    def compile_region(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic
    ) -> Region:
        run = body.forward

        def region(operands: list[Tensor]) -> Sequence[Tensor]:
            result = run(*operands)
            return result if isinstance(result, tuple) else (result,)

        return region
