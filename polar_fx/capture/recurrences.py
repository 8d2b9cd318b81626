"""Recurrences of tokens in a form that one graph for any number of tokens can hold.

transformers calls the recurrences of a model by the names of kernels, and falls back to loops over
tokens or chunks, which a graph would unroll. While a view is traced, the functions here take their
place: sums over pairs of tokens, without a loop over tokens. They go on from the state that a slot
holds, and padding, which comes after a row's own tokens, leaves the state as it is.

Shape legend: B batch, T tokens, H heads, K and V sizes of keys and values, C channels, N size of a
channel's state.
"""

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CaptureError

_BLOCK = 16  # tokens that are taken one by one, in all blocks at once, where channels decay apart


class Rows(Protocol):
    """What a recurrence needs to know of the rows it runs over."""

    real: Tensor  # bool[B, T]: false at padding
    state: Tensor | None  # the recurrent state that the layer asked for last
    scans: int  # how many scans went on from it


class Recurrences:
    """The kernels of a view; whoever traces it sets `rows` before a forward pass."""

    rows: Rows

    def gated_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """S_t = exp(g_t) S_t-1 + beta_t k_t (v_t - exp(g_t) k_t S_t-1)^T, and q_t S_t of each
        token.

        `query`, `key` [B, T, H or fewer, K], `value` [B, T, H, V], `g` (log of the decay) and
        `beta` [B, T, H], states [B, H, K, V]. One chunk of all tokens: Yang et al., "Gated Delta
        Networks", 2024, section 3.3.
        """
        q, k, v, g, beta = self._heads(
            query, key, value, g[..., None], beta, normalized=use_qk_l2norm_in_kernel
        )
        total = g.cumsum(-2)
        between = _between(total[..., 0], total[..., 0])
        pairs = [x @ k.transpose(-1, -2) * between for x in (beta * k, q)]
        out, state = _delta_rule(pairs, (q, k, v), beta=beta, total=total, state=initial_state)
        return out.to(query.dtype), state if output_final_state else None

    def channel_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The same with a decay of its own for each channel of the keys: `g` [B, T, H, K].

        Kimi Team, "Kimi Linear", 2025, section 3.
        """
        q, k, v, g, beta = self._heads(
            query, key, value, g, beta, normalized=use_qk_l2norm_in_kernel
        )
        total = g.cumsum(-2)
        pairs = [_decayed_pairs(x, k, total=total, start=total - g) for x in (beta * k, q)]
        out, state = _delta_rule(pairs, (q, k, v), beta=beta, total=total, state=initial_state)
        return out.to(query.dtype), state if output_final_state else None

    def _heads(self, *given: Tensor, normalized: bool) -> list[Tensor]:
        """Queries and keys [B, H, T, K], values [B, H, T, V], logarithms of decays [B, H, T, K] or
        [B, H, T, 1], and what is written of a token [B, H, T, 1]; nothing decays or is written at
        padding.
        """
        query, key, value, g, beta = (x.transpose(1, 2).float() for x in given)
        real = self.rows.real[:, None, :, None]
        if normalized:
            query, key = (
                x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key)
            )
        if (groups := value.shape[1] // key.shape[1]) > 1:
            query, key = (x.repeat_interleave(groups, 1) for x in (query, key))
        return [query * key.shape[-1] ** -0.5, key, value, g * real, beta[..., None] * real]

    def state_space_scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """S_t = exp(dt_t A) S_t-1 + dt_t x_t B_t^T, and S_t C_t + D x_t of each token.

        `hidden_states` x [B, T, H, V], `dt` [B, T, H], `A` [H], `B`, `C` [B, T, H or fewer, N],
        states [B, H, V, N]. One chunk of all tokens: Dao and Gu, "Transformers are SSMs", 2024,
        section 6.
        """
        groups = hidden_states.shape[2] // B.shape[2]
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        dt = dt.clamp(min=dt_limit[0], max=dt_limit[1]).float() * self.rows.real[..., None]
        x = hidden_states.float().transpose(1, 2)  # [B, H, T, V]
        b, c = (t.float().transpose(1, 2) for t in (B, C))
        if groups > 1:
            b, c = (t.repeat_interleave(groups, 1) for t in (b, c))
        total = (dt * A.float()).transpose(1, 2).cumsum(-1)
        added = x * dt.transpose(1, 2)[..., None]
        out = (c @ b.transpose(-1, -2) * _between(total, total)) @ added
        to_end = (total[..., -1:] - total).exp()[..., None]
        state = added.transpose(-1, -2) @ (b * to_end)
        if initial_states is not None:
            before = initial_states.float()
            out = out + total.exp()[..., None] * (c @ before.transpose(-1, -2))
            state = state + total[..., -1:, None].exp() * before
        if D is not None:
            out = out + (D if D.dim() == 2 else D[:, None])[:, None] * x
        out = out.transpose(1, 2).contiguous()
        return (out, state) if return_final_states else out

    def selective_scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """S_t = exp(dt_t A) S_t-1 + dt_t x_t B_t^T, and S_t C_t + D x_t of each token, gated by z.

        `hidden_states` x, `dt`, `z` [B, C, T], `A` [C, N], `B`, `C` [B, N, T], states [B, C, N].
        Gu and Dao, "Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.2.
        Blocks of tokens are stepped through together, and
        their states are then carried from block to block.
        """
        kept, tokens = hidden_states.dtype, hidden_states.shape[-1]
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        dt = (F.softplus(dt) if delta_softplus else dt).float() * self.rows.real[:, None]
        where = _blocks(tokens, dt.device)

        def in_blocks(value: Tensor) -> Tensor:
            """[B, blocks, tokens of a block, ...] of a value [B, ..., T]."""
            return value.float().transpose(1, 2)[:, where.clamp(max=tokens - 1)]

        steps, x, b, c = map(in_blocks, (dt, hidden_states, B, C))
        steps = steps * (where < tokens)[..., None]
        decays = steps[..., None] * A.float()  # [B, blocks, tokens, C, N], logarithms
        added = (steps * x)[..., None] * b[..., None, :]
        own = added[:, :, 0]
        inside = [own]
        for token in range(1, _BLOCK):
            own = own * decays[:, :, token].exp() + added[:, :, token]
            inside.append(own)
        within = decays.cumsum(2)
        # over blocks, in the last axis
        decay, ends = within[:, :, -1].movedim(1, -1), own.movedim(1, -1)
        total = decay.cumsum(-1)
        state = self._state()[..., None]
        earlier = _between(total - decay, total, itself=False)
        first = (earlier * ends[..., None, :]).sum(-1) + (total - decay).exp() * state
        last = ends[..., -1] + decay[..., -1].exp() * first[..., -1]
        states = torch.stack(inside, 2) + within.exp() * first.movedim(-1, 1)[:, :, None]
        each = torch.arange(tokens, device=dt.device)
        out = (states * c[..., None, :]).sum(-1)[:, each // _BLOCK, each % _BLOCK].transpose(1, 2)
        out = out if D is None else out + hidden_states * D[:, None]
        out = (out if z is None else out * F.silu(z)).to(kept)
        return (out, last) if return_last_state else out

    def _state(self) -> Tensor:
        """The state [B, C, N] to begin with: this kernel is not given one. Of a layer with heads,
        which are scanned one after another, that of the next head.
        """
        rows = self.rows
        if rows.state is None:
            raise CaptureError("a selective scan runs in a layer that asked for no state")
        rows.scans += 1
        return (rows.state if rows.state.dim() == 3 else rows.state[:, rows.scans - 1]).float()


def _delta_rule(
    pairs: Sequence[Tensor],
    of_tokens: Sequence[Tensor],
    *,
    beta: Tensor,
    total: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What each token reads [B, T, H, V], and the state after them.

    `of_tokens` are queries and keys [B, H, T, K] and values [B, H, T, V], `pairs` [B, H, T, T]
    products of keys, and of queries with keys, decayed between the tokens, `total` the cumulated
    logarithms of decays [B, H, T, K] or [B, H, T, 1].
    """
    (q, k, v), (system, reads) = of_tokens, pairs
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    before, decayed = state.float(), total.exp()
    # what each token writes, beside what is there: a triangular system over the tokens
    wanted = beta * (v - (decayed * k) @ before)
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = (decayed * q) @ before + reads @ written
    last = total[..., -1:, :]
    to_end = k * (last - total).exp()
    after = before * last.transpose(-1, -2).exp() + to_end.transpose(-1, -2) @ written
    return out.transpose(1, 2).contiguous(), after


def _decayed_pairs(x: Tensor, k: Tensor, *, total: Tensor, start: Tensor) -> Tensor:
    """Products [B, H, T, T] of x [B, H, T, K] at a token with keys k at it or before it, each
    channel decayed between the two; 0 for keys after it.

    Pairs within a block are taken one by one; a key before the block decays to where the block
    starts, and from there to the token, so that no decay is divided by.
    """
    tokens = torch.arange(x.shape[-2], device=x.device)
    where = _blocks(x.shape[-2], x.device)
    inside = where.clamp(max=x.shape[-2] - 1)
    here, keys, sums = x[:, :, inside], k[:, :, inside], total[:, :, inside]
    begin = start[:, :, inside[:, 0]]  # [B, H, blocks, K]
    gone = tokens >= where[:, :1]  # [blocks, T]
    since = (begin[..., None, :] - total[:, :, None]).masked_fill(gone[..., None], -torch.inf)
    before = (here * (sums - begin[..., None, :]).exp()) @ (k[:, :, None] * since.exp()).transpose(
        -1, -2
    )
    later = torch.arange(_BLOCK, device=x.device)
    later = (later[:, None] < later)[..., None]
    between = (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(later, -torch.inf).exp()
    within = (here[..., :, None, :] * keys[..., None, :, :] * between).sum(-1)
    block, place = tokens // _BLOCK, tokens % _BLOCK
    same = block[:, None] == block
    near = within[:, :, block[:, None], place[:, None], place] * same
    return before[:, :, block, place] + near


def _blocks(tokens: int, device: torch.device) -> Tensor:
    """The tokens i64[blocks, tokens of a block] of each block, those that there are and more."""
    # one block more than is needed: torch.export takes an axis of size one for a constant
    first = torch.arange(tokens // _BLOCK + 2, device=device) * _BLOCK
    return first[:, None] + torch.arange(_BLOCK, device=device)


def _between(to: Tensor, since: Tensor, *, itself: bool = True) -> Tensor:
    """The decay [..., N, N] from place j to each place i > j (or >= j, if `itself`), else 0, of
    cumulated logarithms [..., N] up to i and since j.
    """
    places = torch.arange(to.shape[-1], device=to.device)
    hidden = places[:, None] < places if itself else places[:, None] <= places
    return (to[..., :, None] - since[..., None, :]).masked_fill(hidden, -torch.inf).exp()


# By how the names that transformers gives its kernels end.
_KERNELS: dict[str, Callable[[Recurrences], Callable[..., Any]]] = {
    "chunk_gated_delta_rule": lambda own: own.gated_delta_rule,
    "chunk_kda": lambda own: own.channel_delta_rule,
    "chunk_scan_combined": lambda own: own.state_space_scan,
    "selective_scan_fn": lambda own: own.selective_scan,
}


def replace_recurrences(view: nn.Module) -> Recurrences:
    """Let the modules of a view (never of the user's model) call the functions here where their
    code calls a kernel of that name.
    """
    found = Recurrences()
    for module in view.modules():
        for name, method in inspect.getmembers(type(module), inspect.isfunction):
            function = inspect.unwrap(method)
            scope = getattr(function, "__globals__", {})
            own: dict[str, Any] = {}
            for used in scope.keys() & set(function.__code__.co_names):
                kernel = _kernel_name(scope[used])
                for end, made in _KERNELS.items():
                    if kernel.endswith(end):
                        own[used] = made(found)
            if own:
                copy = FunctionType(
                    function.__code__,
                    {**scope, **own},
                    name,
                    function.__defaults__,
                    function.__closure__,
                )
                copy.__kwdefaults__ = function.__kwdefaults__
                setattr(module, name, MethodType(copy, module))
    return found


def _kernel_name(value: Any) -> str:
    """What transformers calls the kernel that a function of modeling code stands for, if any."""
    code = getattr(value, "__code__", None)
    if code is None or "func_name" not in code.co_freevars:
        return ""
    return str(inspect.getclosurevars(value).nonlocals["func_name"])
