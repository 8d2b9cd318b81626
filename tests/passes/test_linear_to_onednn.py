"""Linears in float32 over several tokens become calls of oneDNN; others stay."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import linear

from hand_made import aten, several_rows
from polar_fx.backends.specialize import graph_of, specialize
from polar_fx.passes.linear_to_onednn import LinearToOneDnn

PASS = LinearToOneDnn()


class _Linear(torch.nn.Module):
    def forward(self, *operands: Tensor) -> Tensor:
        return linear(*operands)


def _traced(operands: Sequence[Tensor], dynamic: Sequence[dict[int, str]] = ()) -> GraphModule:
    """As backends hand graphs to their passes."""
    return graph_of(specialize(_Linear(), operands, dynamic=dynamic or [{}] * len(operands)))


@pytest.mark.parametrize("bias", [False, True])
def test_linears_of_any_number_of_tokens_are_rewritten(bias: bool) -> None:
    torch.manual_seed(0)
    x, *weights = torch.randn(2, 5, 16), torch.randn(8, 16), torch.randn(8)
    weights = weights if bias else weights[:1]
    gm = _traced([x, *weights], [{0: "batch", 1: "tokens"}, *({} for _ in weights)])
    result = PASS.run(gm)
    assert result.counts == {"linears rewritten": 1}
    target, graph = torch.ops.polar_fx.onednn_linear.default, result.graph_module.graph
    assert len(graph.find_nodes(op="call_function", target=target)) == 1
    for shape in ((2, 5, 16), (3, 2, 16)):
        more = torch.randn(shape)
        torch.testing.assert_close(result.graph_module(more, *weights)[0], linear(more, *weights))


OTHERS: dict[str, list[Tensor]] = {
    "bfloat16": [torch.ones(1, 5, 16).bfloat16(), torch.ones(8, 16).bfloat16()],
    "float64": [torch.ones(1, 5, 16).double(), torch.ones(8, 16).double()],
    "a weight laid out in another order": [torch.ones(1, 5, 16), torch.ones(16, 8).t()],
    "a vector": [torch.ones(16), torch.ones(8, 16)],
    "one token of each row": [torch.ones(3, 1, 16), torch.ones(8, 16)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_linears_stay(name: str) -> None:
    gm = _traced(OTHERS[name])
    assert gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert not PASS.run(gm).modified


def test_linears_elsewhere_stay() -> None:
    gm = several_rows(tokens=2)
    assert not PASS.run(gm).modified, "example values on the meta device: not the CPU"
