"""Tiny models whose layers have two attentions each, with keys and values of their own, and their
programs as a plain loop over their layers.

Shape legend: T tokens, V vocabulary.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer

from polar_fx.capture import CACHE
from polar_fx.capture.checked import capture_checked
from polar_fx.compiled import CompiledModel, compile
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from tiny_models import WINDOW, compiled_by, make, spread

DEPTH = 3
# With experts, some of which hand their tokens on as they are.
EXPERTS: dict[str, Any] = dict(
    num_key_value_heads=4,
    ffn_hidden_size=32,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    head_dim=4,
    v_head_dim=8,
    moe_topk=2,
    n_routed_experts=3,
    zero_expert_num=2,
    expert_ffn_hidden_size=16,
    routed_scaling_factor=1.0,
)


class _TwoAttentions(MistralDecoderLayer):
    """The second attention has fewer heads of keys and values, and the first number."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, 2 * layer_idx + 1)
        fewer = copy.deepcopy(config)
        fewer.num_key_value_heads = 1
        self.other = MistralAttention(fewer, 2 * layer_idx)
        self.other.config = config

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        hidden_states = super().forward(hidden_states, **given)
        normed = self.input_layernorm(hidden_states)
        return hidden_states + self.other(hidden_states=normed, **given)[0]


def make_double(depth: int = DEPTH) -> Any:
    """A model of its own: a sliding window, and layers of two attentions."""
    model = make("mistral", num_hidden_layers=depth, sliding_window=WINDOW, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [_TwoAttentions(model.config, layer) for layer in range(depth)]
        model.model.layers = nn.ModuleList(layers)
        return spread(model.eval())


def make_with_experts(kind: str, depth: int) -> Any:
    """One of a type that transformers has, whose configuration counts attentions as layers."""
    return make(kind, **EXPERTS, num_layers=depth, num_hidden_layers=2 * depth)


@functools.cache
def double_model() -> Any:
    """The source of all that follows."""
    return make_double()


@functools.cache
def double_library() -> LayerLibrary:
    """Its capture."""
    return LayerLibrary(capture_checked(double_model()))


@functools.cache
def double_compiled(backend: str = "eager") -> CompiledModel:
    """It, interpreted or compiled."""
    return compiled_by(double_library(), double_model(), backend=backend)


def double_compiled_to_files() -> CompiledModel:
    """It, compiled once a test session, for prompts in parts of 8 tokens."""
    return compile(make_double(2), "aot_inductor", max_length=63, prefill_chunk=8)


@torch.no_grad()
def double_logits(model: Any, program: Program, *, row: Tensor, part: int = 9) -> Tensor:
    """Logits [T, V] of the tokens i64[T] of one row, by a loop over HuggingFace's layers, in parts:
    each step has a cache of its own, where its layer finds what it has stored under its numbers.
    """
    inner, caches, found = model.model, [DynamicCache() for _ in program.path], []
    window = getattr(model.config, "sliding_window", None) or len(row)
    for start in range(0, len(row), part):
        hidden = inner.embed_tokens(row[None, start : start + part])
        tokens = torch.arange(start, start + hidden.shape[1])
        before = torch.arange(start + hidden.shape[1])
        distance = tokens[:, None] - before
        given = {
            "attention_mask": ((distance >= 0) & (distance < window))[None, None],
            "position_ids": tokens[None],
            "position_embeddings": inner.rotary_emb(hidden, tokens[None]),
        }
        saved: list[Tensor] = []
        for step, cache in zip(program.schedule(), caches, strict=True):
            saved += [hidden] * step.opens
            hidden = inner.layers[step.layer](hidden, **given, **{CACHE: cache})
            for damping in step.closes:
                opened = saved.pop()
                hidden = opened + damping * (hidden - opened)
        found.append(model.lm_head(inner.norm(hidden))[0])
    return torch.cat(found)
