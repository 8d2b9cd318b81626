"""Graphs as backends hand them to their passes, and what is in them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from polar_fx.backends.specialize import graph_of, specialize


def traced(
    function: Callable[..., Any], *operands: Tensor, dynamic: Sequence[dict[int, str]] = ()
) -> GraphModule:
    """The graph of a function of tensors: exported, its operands' sizes known (or, along `dynamic`,
    not).
    """

    class Body(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return function(*values)

    return graph_of(specialize(Body(), operands, dynamic=dynamic or [{}] * len(operands)))


def calls_of(gm: GraphModule, *targets: Any) -> int:
    """How many nodes call one of them."""
    return sum(n.target in targets for n in gm.graph.nodes)
