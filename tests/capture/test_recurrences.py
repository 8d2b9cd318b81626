"""Recurrences over pairs of tokens: what a loop over tokens gives, from any state and past padding.

Shape legend: B batch, T tokens, H heads, K and V sizes of keys and values, C channels, N size of a
channel's state.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polar_fx.capture.recurrences import Recurrences

B, H, K, V, N = 2, 4, 6, 5, 3
LENGTHS = (1, 2, 16, 17, 35)  # a selective scan goes by blocks of 16


@dataclass
class Rows:
    """Rows of which the second has one token less than the first."""

    real: Tensor
    state: Tensor | None = None
    scans: int = 0


def ragged(tokens: int, state: Tensor | None = None) -> tuple[Recurrences, list[int]]:
    """Recurrences over such rows, and the tokens of each."""
    counts = [tokens, tokens - 1]
    own = Recurrences()
    own.rows = Rows(torch.arange(tokens) < torch.tensor(counts)[:, None], state)
    torch.manual_seed(tokens)
    return own, counts


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_delta_rules(tokens: int, by_channel: bool) -> None:
    """With a decay a head, and two heads a key; and with one a channel of the keys."""
    own, counts = ragged(tokens)
    groups = 1 if by_channel else 2
    q, k = torch.randn(2, B, tokens, H // groups, K)
    v, before = torch.randn(B, tokens, H, V), torch.randn(B, H, K, V)
    g, beta = -torch.rand(B, tokens, H, K if by_channel else 1), torch.rand(B, tokens, H)
    options: Any = dict(use_qk_l2norm_in_kernel=True, output_final_state=True)
    rule = own.channel_delta_rule if by_channel else own.gated_delta_rule
    given = g if by_channel else g[..., 0]
    out, after = rule(q, k, v, given, beta, initial_state=before, **options)
    assert after is not None
    fresh, _ = rule(q, k, v, given, beta, initial_state=torch.zeros_like(before), **options)
    close(rule(q, k, v, given, beta, **options)[0], fresh)
    q, k = (F.normalize(x, dim=-1).repeat_interleave(groups, 2).double() for x in (q, k))
    for row, count in enumerate(counts):
        state = before[row].double()
        for t in range(count):
            state = state * g[row, t].exp()[..., None]
            missing = v[row, t] - (k[row, t][:, None] @ state)[:, 0]
            state = state + k[row, t][..., None] * (beta[row, t][:, None] * missing)[:, None]
            close(out[row, t], (q[row, t][:, None] @ state)[:, 0] * K**-0.5)
        close(after[row], state)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_state_space_scan(tokens: int) -> None:
    own, counts = ragged(tokens)
    x, dt = torch.randn(B, tokens, H, V), torch.randn(B, tokens, H)
    b, c = torch.randn(2, B, tokens, 2, N)
    a, d, bias, before = -torch.rand(H), torch.randn(H), torch.randn(H), torch.randn(B, H, V, N)
    out, after = own.state_space_scan(
        x, dt, a, b, c, 4, D=d, dt_bias=bias, initial_states=before, dt_softplus=True,
        dt_limit=(0.01, 0.5), return_final_states=True,
    )  # fmt: skip
    steps = F.softplus(dt + bias).clamp(0.01, 0.5).double()
    b, c = (y.repeat_interleave(2, 2).double() for y in (b, c))
    for row, count in enumerate(counts):
        state = before[row].double()
        for t in range(count):
            step = steps[row, t][:, None, None]
            state = state * (step * a[:, None, None]).exp()
            state = state + step * x[row, t][..., None] * b[row, t][:, None]
            close(out[row, t], (state @ c[row, t][..., None])[..., 0] + d[:, None] * x[row, t])
        close(after[row], state)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_selective_scan(tokens: int) -> None:
    before = torch.randn(B, V, N, generator=torch.Generator().manual_seed(0))
    own, counts = ragged(tokens, state=before)
    x, dt, z = torch.randn(3, B, V, tokens)
    b, c = torch.randn(2, B, N, tokens)
    a, d, bias = -torch.rand(V, N), torch.randn(V), torch.randn(V)
    options: Any = dict(delta_bias=bias, delta_softplus=True, return_last_state=True)
    out, after = own.selective_scan(x, dt, a, b, c, d, z, **options)
    steps = F.softplus(dt + bias[:, None]).double()
    for row, count in enumerate(counts):
        state = before[row].double()
        for t in range(count):
            step = steps[row, :, t][:, None]
            state = state * (step * a).exp() + step * x[row, :, t][:, None] * b[row, :, t]
            want = state @ c[row, :, t].double() + d * x[row, :, t]
            close(out[row, :, t], want * F.silu(z[row, :, t]))
        close(after[row], state)
