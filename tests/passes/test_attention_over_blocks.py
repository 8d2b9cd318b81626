"""Attention over blocks becomes one operator; other attention stays.

Shape legend: B rows, T tokens, H heads of keys, G heads of the query for each, E and F sizes of a
head of keys and of values, W blocks of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from hand_made import aten, several_queries
from over_blocks import DYNAMIC, attention, columns, operands
from polar_fx.backends.specialize import graph_of, specialize
from polar_fx.passes.attention_over_blocks import AttentionOverBlocks

PASS = AttentionOverBlocks()


class _Body(torch.nn.Module):
    def __init__(self, function: Callable[[Sequence[Tensor]], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(given)


def _traced(
    given: list[Tensor],
    function: Callable[[Sequence[Tensor]], Tensor] = attention,
    *,
    dynamic: Any = None,
) -> GraphModule:
    """As backends hand graphs to their passes."""
    return graph_of(specialize(_Body(function), given, dynamic=dynamic or [{}] * len(given)))


def _is_rewritten(gm: GraphModule) -> bool:
    assert gm.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ), "there is attention to rewrite"
    result = PASS.run(gm)
    assert result.counts in ({}, {"attentions rewritten": 1})
    return result.modified


CASES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "every head its own keys": {"groups": 1},
    "values of another size": {"value_size": 12},
    "a mask for each head": {"mask_heads": True},
    "scores that are added to": {"added": True},
    "no mask": {"mask": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "one token": {"tokens": 1},
    "one token in bfloat16, heads that share nothing": {
        "tokens": 1,
        "groups": 1,
        "dtype": torch.bfloat16,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_attention_over_blocks_is_rewritten(name: str) -> None:
    given = operands(**CASES[name])
    result = PASS.run(_traced(given))
    assert result.counts == {"attentions rewritten": 1}
    target, graph = torch.ops.polar_fx.block_attention.default, result.graph_module.graph
    assert len(graph.find_nodes(op="call_function", target=target)) == 1
    torch.testing.assert_close(result.graph_module(*given)[0], attention(given))


@pytest.mark.parametrize(("rows", "tokens", "blocks"), [(3, 2, 4), (2, 70, 2)])
def test_any_number_of_rows_tokens_and_blocks(rows: int, tokens: int, blocks: int) -> None:
    result = PASS.run(_traced(operands(), dynamic=DYNAMIC))
    assert result.modified
    given = operands(rows=rows, tokens=tokens, blocks=blocks)
    torch.testing.assert_close(result.graph_module(*given)[0], attention(given))


OTHERS: dict[str, dict[str, Any]] = {
    "a head of an odd size": {"size": 15},
    "a head larger than the kernel's": {"size": 258},
    "blocks of an odd number of columns": {"block": 15},
    "prompts in bfloat16 whose heads share nothing": {"groups": 1, "dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_and_dtypes_stay(name: str) -> None:
    assert not _is_rewritten(_traced(operands(**OTHERS[name])))


def _of_slots(given: Sequence[Tensor]) -> Tensor:
    """Keys and values as they lie in slots: the blocks are not used."""
    query, key, value, blocks, mask = given
    keys, values = (s[: len(blocks)].repeat(1, 1, blocks.shape[1], 1) for s in (key, value))
    return scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    )


def _of_two_tables(given: Sequence[Tensor]) -> Tensor:
    """Values of other blocks than the keys."""
    query, key, value, blocks, mask = given
    keys, values = columns(key, blocks), columns(value, blocks.flip(1))
    return scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    )


def _of_one_store(given: Sequence[Tensor]) -> Tensor:
    """Keys that are their own values."""
    query, key, _, blocks, mask = given
    return attention([query, key, key, blocks, mask])


def _of_fewer_heads(given: Sequence[Tensor]) -> Tensor:
    """One head of keys for two of values."""
    query, key, value, blocks, mask = given
    return attention([query, key[:, :1].contiguous(), value, blocks, mask])


def _of_the_same_blocks_for_all_rows(given: Sequence[Tensor]) -> Tensor:
    query, key, value, blocks, mask = given
    return attention([query, key, value, blocks[:1], mask])


def _in_another_order(given: Sequence[Tensor]) -> Tensor:
    """Columns of a block before blocks."""
    query, key, value, blocks, mask = given
    keys, values = (s[blocks].permute(0, 2, 3, 1, 4).flatten(2, 3) for s in (key, value))
    return scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    )


OTHER_READS = (
    *(_of_slots, _of_two_tables, _of_one_store, _of_fewer_heads),
    *(_of_the_same_blocks_for_all_rows, _in_another_order),
)


@pytest.mark.parametrize("function", OTHER_READS)
def test_what_the_kernel_cannot_do_stays(function: Callable[[Sequence[Tensor]], Tensor]) -> None:
    assert not _is_rewritten(_traced(operands(), function))


def test_attention_elsewhere_stays() -> None:
    assert not PASS.run(several_queries()).modified, (
        "example values on the meta device: not the CPU"
    )
