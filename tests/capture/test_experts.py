"""Loops over chosen experts become one computation where it gives the same, and stay else.

Shape legend: N tokens, E experts, d hidden size, I size between.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polar_fx.capture.experts import replace_expert_loops


class Experts(nn.Module):
    """A loop over those that are chosen; the last ones hand their tokens on as they are."""

    def __init__(self, with_weights: int, total: int, *, size: int = 8) -> None:
        super().__init__()
        self.count, self.act_fn = with_weights, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(total, 16, size))
        self.down_proj = nn.Parameter(torch.randn(with_weights, size, 8))

    def expert(self, x: Tensor, number: int) -> Tensor:
        gate, up = (x @ self.gate_up_proj[number].T).chunk(2, -1)
        return (self.act_fn(gate) * up) @ self.down_proj[number].T

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        found = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == number)
            states = hidden_states[token]
            if number < self.count:
                states = self.expert(states, number)
            found.index_add_(0, token, states * top_k_weights[token, place, None])
        return found


class UpFirst(Experts):
    """The halves of the first weights are the other way round."""

    def expert(self, x: Tensor, number: int) -> Tensor:
        up, gate = (x @ self.gate_up_proj[number].T).chunk(2, -1)
        return (self.act_fn(gate) * up) @ self.down_proj[number].T


class Limited(Experts):
    """Large values are cut off, in a gate of the class's own."""

    def expert(self, x: Tensor, number: int) -> Tensor:
        return self._apply_gate(x @ self.gate_up_proj[number].T) @ self.down_proj[number].T

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return self.act_fn(gate).clamp(max=50) * up.clamp(-50, 50)


class LimitedInside(Limited):
    """The same, where nothing tells of it."""

    def expert(self, x: Tensor, number: int) -> Tensor:
        both = Limited._apply_gate(self, x @ self.gate_up_proj[number].T)
        return both @ self.down_proj[number].T

    _apply_gate = None  # type: ignore[assignment]


class Renamed(Experts):
    """The arguments have other names, and may mean something else."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Any:
        return super().forward(x, index, weights)


def _given(total: int) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.stack([torch.randperm(total)[:2] for _ in range(20)])
    return torch.randn(20, 8), index, torch.rand(20, 2)


@pytest.mark.parametrize(("with_weights", "total"), [(4, 4), (4, 6), (1, 2)])
def test_all_at_once_is_the_loop(with_weights: int, total: int) -> None:
    torch.manual_seed(0)
    loop = Experts(with_weights, total)
    given = _given(total)
    with torch.no_grad():
        want = loop(*given)
        replace_expert_loops(nn.ModuleList([loop]))
        assert "forward" in vars(loop)
        torch.testing.assert_close(loop(*given), want, rtol=1e-4, atol=1e-4)


def test_limits_of_a_gate_are_kept() -> None:
    torch.manual_seed(0)
    loop, (x, index, weights) = Limited(4, 4), _given(4)
    with torch.no_grad():
        want = loop(100 * x, index, weights)
        assert not torch.allclose(want, Experts.forward(_unlimited(loop), 100 * x, index, weights))
        replace_expert_loops(nn.ModuleList([loop]))
        assert "forward" in vars(loop)
        torch.testing.assert_close(loop(100 * x, index, weights), want, rtol=1e-4, atol=1e-3)


def _unlimited(loop: Experts) -> Experts:
    other = Experts(loop.count, len(loop.gate_up_proj))
    other.load_state_dict(loop.state_dict())
    return other


@pytest.mark.parametrize("kind", [UpFirst, Renamed, LimitedInside])
def test_what_computes_something_else_stays(kind: type[Experts]) -> None:
    torch.manual_seed(0)
    loop = kind(4, 6)
    replace_expert_loops(nn.ModuleList([loop]))
    assert "forward" not in vars(loop)


def test_the_graph_holds_for_other_choices() -> None:
    torch.manual_seed(0)
    loop, rows = Experts(4, 6), torch.export.Dim("rows")
    replace_expert_loops(nn.ModuleList([loop]))
    shapes = ({0: rows}, {0: rows}, {0: rows})
    with torch.no_grad():
        traced = torch.export.export(loop, _given(6), dynamic_shapes=shapes).module()
        other = tuple(t[:7] for t in _given(6))
        want = Experts.forward(loop, *other)
        torch.testing.assert_close(traced(*other), want, rtol=1e-4, atol=1e-4)
