"""A tiny model whose layers hand on several streams side by side, [S, B, T, d], and its programs as
a plain loop over its layers.

Shape legend: T tokens, S streams, V vocabulary.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from polar_fx.capture.checked import capture_checked
from polar_fx.compiled import CompiledModel, compile
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from tiny_models import WINDOW, compiled_by, make

STREAMS = 3
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
OWNERS = {2: 0, 3: 1}  # of each layer that reads, of a model whose layers share keys and values


def make_streams(*, shared: int = 0, sparsity: float = 0.5) -> Any:
    """A model of its own: four layers, the last `shared` of which read the keys and values of
    earlier ones; the first lets a part `sparsity` of its activations go.
    """
    return make(
        "gemma3n_text",
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=KINDS,
        num_kv_shared_layers=shared,
        altup_num_inputs=STREAMS,
        altup_active_idx=1,
        laurel_rank=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=100,
        activation_sparsity_pattern=[sparsity, 0.0, 0.0, 0.0],
    )


@functools.cache
def streams_model(shared: int = 0) -> Any:
    """The source of all that follows."""
    return make_streams(shared=shared)


@functools.cache
def streams_library(shared: int = 0) -> LayerLibrary:
    """Its capture."""
    return LayerLibrary(capture_checked(streams_model(shared)))


@functools.cache
def streams_compiled(shared: int = 0, backend: str = "eager") -> CompiledModel:
    """It, interpreted or compiled."""
    return compiled_by(streams_library(shared), streams_model(shared), backend=backend)


def streams_compiled_to_files() -> CompiledModel:
    """It, compiled once a test session, for prompts in parts of 8 tokens."""
    return compile(make_streams(shared=2), "aot_inductor", max_length=63, prefill_chunk=8)


@torch.no_grad()
def streams_logits(model: Any, program: Program, *, row: Tensor) -> Tensor:
    """Logits [T, V] of the tokens i64[T] of one row, by a loop over HuggingFace's layers: none of
    our code runs here but the schedule of blends.
    """
    inner, config, tokens = model.model, model.config, torch.arange(len(row))
    embedded = inner.embed_tokens(row[None])
    each = inner.project_per_layer_inputs(embedded, inner.get_per_layer_inputs(row[None]))
    causal = tokens[:, None] >= tokens
    near = causal & (tokens[:, None] < tokens + config.sliding_window)
    masks = {"full_attention": causal, "sliding_attention": near}
    streams = [embedded, *(project(embedded) for project in inner.altup_projections)]
    hidden = torch.stack([_as_large(stream, embedded) for stream in streams])
    stored: dict[str, tuple[Tensor, Tensor]] = {}
    saved: list[Tensor] = []
    for step in program.schedule():
        saved += [hidden] * step.opens
        kind = config.layer_types[step.layer]
        hidden = inner.layers[step.layer](
            hidden,
            inner.rotary_emb(hidden, tokens[None], kind),
            each[:, :, step.layer],
            shared_kv_states=stored,
            attention_mask=masks[kind][None, None],
            position_ids=tokens[None],
        )
        for damping in step.closes:
            before = saved.pop()
            hidden = before + damping * (hidden - before)
    first, *others = hidden
    streams = [first]
    for project, stream in zip(inner.altup_unembed_projections, others, strict=True):
        streams.append(_as_large(project(stream), first))
    logits = model.lm_head(inner.norm(torch.stack(streams).mean(0)))[0]
    return config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)


def _as_large(stream: Tensor, other: Tensor) -> Tensor:
    """The stream with the norm that another one has at each token."""
    if stream is other:
        return stream
    want = (other**2).mean(-1, keepdim=True) ** 0.5
    return stream * want / (stream**2).mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
