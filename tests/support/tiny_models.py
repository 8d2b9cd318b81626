"""Tiny models of many families, random weights, nothing downloaded; and the way tests run them.

Shape legend: B batch, T tokens, L KV length, V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from polar_fx.backends import get_backend
from polar_fx.capture import CapturedModel
from polar_fx.capture.checked import capture_checked
from polar_fx.compiled import CompiledModel
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner
from traced_once import models_traced_anew

transformers_logging.set_verbosity_error()

# shorter than the prompts of the tests, so that the window matters
WINDOW = 8
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
_BASE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2 = dict(n_embd=32, n_layer=4, n_head=4, n_positions=256)
_MOE = dict(num_experts=4, num_experts_per_tok=2)

# What each family's config needs beyond _BASE.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": dict(n_head=4, n_layer=4),
    "codegen": {**_GPT2, "rotary_dim": 4},
    "cohere": {},
    "cohere2": dict(sliding_window=WINDOW, head_dim=8),
    "deepseek_v3": dict(
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "ernie4_5": {},
    "exaone4": dict(sliding_window=WINDOW),
    "falcon": {},
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3_text": dict(
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma4_text": dict(
        head_dim=8,
        global_head_dim=16,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
    ),
    "glm4": dict(head_dim=8),
    "gpt2": {**_GPT2, "n_inner": 64},
    "gpt_bigcode": _GPT2,
    "gpt_neox": {},
    "gpt_oss": dict(
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=_SLIDING_AND_FULL,
    ),
    "gptj": {**_GPT2, "rotary_dim": 4},
    "granite": {},
    "helium": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "llama": {},
    "jetmoe": dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "mistral": dict(sliding_window=WINDOW, head_dim=8),
    "mixtral": dict(num_local_experts=4, head_dim=8),
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": _MOE,
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": dict(**_MOE, moe_intermediate_size=16, shared_expert_intermediate_size=32),
    "qwen3": dict(head_dim=16),
    "qwen3_moe": dict(**_MOE, moe_intermediate_size=16, head_dim=8),
    "seed_oss": dict(head_dim=8),
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}

# Models whose layers keep states: of convolutions, gated delta nets, Mamba 1 and 2, beside
# attention in other layers or in the same ones; of the last one, a layer keeps nothing at all.
_DELTA_NET = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": dict(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "qwen3_5_text": dict(
        **_DELTA_NET,
        head_dim=8,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mamba": dict(num_hidden_layers=1),
    "falcon_h1": dict(
        num_hidden_layers=1,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    "nemotron_h": dict(
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=4,
        head_dim=8,
        layers_block_type=["linear_attention", "mlp", "full_attention"],
    ),
}


# Models that attend to the few tokens that further keys of theirs choose. With fewer heads, tokens
# often score exactly 0, and which of them are chosen is up to the processor.
_CHOOSING = dict(
    num_hidden_layers=2,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=2,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_n_heads=32,
    index_head_dim=8,
    index_topk=4,
)
CHOOSING: dict[str, dict[str, Any]] = {
    "axk2": {**_CHOOSING, "first_k_dense_replace": 1},
    "deepseek_v32": _CHOOSING,
    "glm_moe_dsa": _CHOOSING,
}


def make(family: str, **overrides: Any) -> Any:
    """A tiny PreTrainedModel in eval mode; equal arguments give equal weights.

    Typed as Any, because transformers wraps `to`, `cuda` and `generate` so that no type is left.
    """
    config = AutoConfig.for_model(
        family, **{**_BASE, **{**FAMILIES, **HYBRIDS, **CHOOSING}.get(family, {}), **overrides}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(AutoModelForCausalLM.from_config(config).eval())


@torch.no_grad()
def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of trained size: with the usual tiny initial ones attention is flat, and masks and
    rotary hardly show.
    """
    for p in model.parameters():
        noise = torch.randn(p.shape).to(p.dtype)
        p.copy_(noise * 1.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else p + 0.1 * noise)
    return model


def _module_state(module: nn.Module) -> tuple[bool, dict[str, int]]:
    """Which objects a module holds, and how many hooks."""
    attributes = vars(module).items()
    return module.training, {k: len(v) if k.endswith("hooks") else id(v) for k, v in attributes}


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything a capture must leave alone."""
    modules = {name: _module_state(module) for name, module in model.named_modules()}
    tensors = {
        n: (t.data_ptr(), t._version, t.requires_grad)
        for n, t in model.state_dict(keep_vars=True).items()
    }
    return {
        "modules": modules,
        "tensors": tensors,
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


@dataclass(frozen=True)
class Tiny:
    """A model, what it was before its capture, and its capture."""

    model: PreTrainedModel
    before: dict[str, Any]
    captured: CapturedModel

    @functools.cached_property
    def library(self) -> LayerLibrary:
        return LayerLibrary(self.captured)


@functools.cache
def tiny(family: str) -> Tiny:
    """The family's tiny model, captured once a session."""
    model = make(family)
    before = snapshot(model)
    with models_traced_anew():
        return Tiny(model, before, capture_checked(model))


def prompts(*lengths: int, vocab: int = 100) -> list[Tensor]:
    """Random rows of token ids i64[T]."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def make_slots(
    library: LayerLibrary, program: Program, *, batch: int, length: int
) -> list[tuple[Tensor, ...]]:
    """Empty slots of a program's steps."""
    cpu = torch.device("cpu")
    return [spec.slot(batch, length=length, device=cpu) for spec in library.kv_specs(program)]


def run_rows(
    library: LayerLibrary,
    program: Program,
    *,
    rows: Sequence[Tensor],
    prefill: Sequence[int],
    length: int = 32,
) -> list[Tensor]:
    """Logits [T, V] of each row: one ragged batch by the interpreter, first prefill[b] tokens a
    row, then one at a time.
    """
    slots = make_slots(library, program, batch=len(rows), length=length)
    index = torch.arange(length)
    got: list[list[Tensor]] = [[] for _ in rows]
    done, chunk = [0] * len(rows), list(prefill)
    while any(n < len(r) for n, r in zip(done, rows, strict=True)):
        parts = [slice(n, min(n + c, len(r))) for n, c, r in zip(done, chunk, rows, strict=True)]
        ids = pad_sequence([r[p] for r, p in zip(rows, parts, strict=True)], batch_first=True)
        positions = pad_sequence(
            [index[p] for p in parts], batch_first=True, padding_value=length - 1
        )
        logits = library.interpret(program, ids, positions, index, slots)
        for i, part in enumerate(parts):
            got[i].append(logits[i, : part.stop - part.start])
        done, chunk = [p.stop for p in parts], [1] * len(rows)
    return [torch.cat(g) for g in got]


@torch.no_grad()
def reference(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each row alone, by the model itself."""
    return [model(input_ids=r[None], use_cache=False).logits[0] for r in rows]


@functools.cache
def compiled(family: str, backend: str = "eager") -> CompiledModel:
    """A tiny model that is interpreted or compiled, on the capture that all tests share."""
    return compiled_by(tiny(family).library, tiny(family).model, backend=backend, max_length=60)


def compiled_by(
    library: LayerLibrary, model: PreTrainedModel, *, backend: str, max_length: int = 100
) -> CompiledModel:
    """A captured model, interpreted or compiled."""
    regions = RegionTable(
        library, get_backend(backend), max_length=max_length, store=None, workers=0
    )
    return CompiledModel(Runner.of_model(model, regions))
