"""Experts in a form that one graph for any tokens can hold.

Most modeling code hands its experts to functions of transformers, which sort the tokens by expert.
Some has only a loop over the experts that its tokens have chosen, which no graph can hold, since
another call has other choices. While a view is traced, the same functions take the place of such a
loop, if they are found to compute the same.

Shape legend: N tokens, K experts chosen for each, E experts, R of them with weights, d hidden size,
I size between.
"""

import inspect
import logging
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

log = logging.getLogger("polar_fx.capture")

_GROUPED = "grouped_mm"  # what models take that have the choice
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_SCALES = (1.0, 30.0, 1000.0)  # of tokens: limits that a loop puts on large values are seen


def replace_expert_loops(view: nn.Module) -> None:
    """Let the modules of a view (never of the user's model) that loop over chosen experts compute
    all of them at once, where that gives the same.
    """
    for path, module in view.named_modules():
        if _is_loop(module) and _is_the_same(module, path):
            module.forward = MethodType(_at_once, module)


def _is_loop(module: nn.Module) -> bool:
    """Whether a module has the weights and the arguments of experts by transformers' names for
    them, and does not ask transformers for a function.
    """
    if hasattr(module, "has_gate") or not isinstance(getattr(module, "act_fn", None), nn.Module):
        return False
    gate_up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or (gate_up.dim(), down.dim()) != (3, 3):
        return False
    return tuple(inspect.signature(type(module).forward).parameters)[1:] == _ARGUMENTS


def _at_once(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    """The weighted sum [N, d] of what the chosen experts i[N, K] make of each token [N, d].

    The weights are [E, 2I, d] and [R, d, I]; an expert without the latter hands its tokens on as
    they are.
    """
    count, total = module.down_proj.shape[0], module.gate_up_proj.shape[0]
    experts = SimpleNamespace(
        gate_up_proj=module.gate_up_proj[:count],
        down_proj=module.down_proj,
        act_fn=module.act_fn,
        num_experts=count,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=total > count,  # choices past the last expert count for nothing
    )
    own_gate = getattr(module, "_apply_gate", None)
    experts._apply_gate = own_gate or MethodType(_gated, experts)
    function: Any = ALL_EXPERTS_FUNCTIONS[_GROUPED]
    if total == count:
        return function(experts, hidden_states, top_k_index, top_k_weights)
    plain = top_k_index >= count
    own = top_k_weights.masked_fill(plain, 0)
    found = function(experts, hidden_states, top_k_index, own)
    kept = (top_k_weights - own).sum(-1, keepdim=True)
    return found + (hidden_states * kept).to(found.dtype)


def _gated(experts: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


@torch.no_grad()
def _is_the_same(module: Any, path: str) -> bool:
    """Whether the module's own loop gives what `_at_once` gives, of the experts at both ends of
    either kind.
    """
    weight = module.gate_up_proj
    count, total, size = module.down_proj.shape[0], weight.shape[0], weight.shape[2]
    tried = sorted({n for n in (0, 1, count - 1, count, total - 1) if 0 <= n < total})
    first = torch.tensor(tried, device=weight.device)
    chosen = torch.stack((first, first.roll(1)), -1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(tried), size, generator=generator).to(weight)
    weights = torch.rand(chosen.shape, generator=generator).to(weight) + 0.5
    try:
        same = all(_near(module, x * scale, chosen, weights) for scale in _SCALES)
    except Exception as error:  # whatever code of another kind raises: it stays as it is
        log.info("%s is not run as experts at once: %r", path, error)
        return False
    log.info("%s %s experts at once", path, "runs its" if same else "is not the same as")
    return same


def _near(module: Any, *given: Tensor) -> bool:
    """Whether both give the same, within rounding; values too large for the dtype tell nothing."""
    want, got = module(*given), _at_once(module, *given)
    if want.shape != got.shape:
        return False
    if not bool(want.isfinite().all()):
        return True
    scale = float(want.abs().max()) or 1.0
    near = _NEAR.get(want.dtype, _NEAR[torch.float32])
    return float((got - want).abs().max()) <= near * scale
