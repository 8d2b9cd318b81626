"""A tiny model whose later layers read the keys and values of earlier ones, its programs as a plain
loop over its layers, and random programs of it.

Shape legend: T tokens, V vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from polar_fx.capture.checked import capture_checked
from polar_fx.compiled import CompiledModel, compile
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from tiny_models import FAMILIES, compiled_by, make

OWNERS = {2: 0, 3: 1, 4: 1}  # of each reader
DEPTH = 5


def make_sharing(**overrides: Any) -> PreTrainedModel:
    """A model of its own."""
    kinds = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    options = {**FAMILIES["gemma4_text"], "num_hidden_layers": DEPTH, "num_kv_shared_layers": 3}
    options |= {"layer_types": kinds, "final_logit_softcapping": None, **overrides}
    return make("gemma4_text", **options)


@functools.cache
def sharing_model() -> PreTrainedModel:
    """The source of all that follows."""
    return make_sharing()


@functools.cache
def sharing_library() -> LayerLibrary:
    """Its capture."""
    return LayerLibrary(capture_checked(sharing_model()))


@functools.cache
def sharing_compiled(backend: str = "eager") -> CompiledModel:
    """It, interpreted or compiled."""
    return compiled_by(sharing_library(), sharing_model(), backend=backend)


def sharing_compiled_to_files() -> CompiledModel:
    """It, compiled once a test session, for prompts in parts of 8 tokens."""
    return compile(sharing_model(), "aot_inductor", max_length=63, prefill_chunk=8)


@torch.no_grad()
def sharing_logits(program: Program, row: Tensor) -> Tensor:
    """Logits [T, V] of the tokens i64[T] of one row, by a loop over HuggingFace's layers: none of
    our code runs here but the schedule of blends.
    """
    model: Any = sharing_model()
    inner, config, tokens = model.model, model.config, torch.arange(len(row))
    hidden = inner.embed_tokens(row[None])
    each = inner.project_per_layer_inputs(hidden, inner.get_per_layer_inputs(row[None], None))
    causal = tokens[:, None] >= tokens
    near = causal & (tokens[:, None] < tokens + config.sliding_window)
    masks = {"full_attention": causal, "sliding_attention": near}
    stored: dict[str, tuple[Tensor, Tensor]] = {}
    saved: list[Tensor] = []
    for step in program.schedule():
        saved += [hidden] * step.opens
        kind = config.layer_types[step.layer]
        hidden = inner.layers[step.layer](
            hidden,
            each[:, :, step.layer],
            shared_kv_states=stored,
            position_embeddings=inner.rotary_emb(hidden, tokens[None], kind),
            attention_mask=masks[kind][None, None],
            position_ids=tokens[None],
        )
        for damping in step.closes:
            before = saved.pop()
            hidden = before + damping * (hidden - before)
    return model.lm_head(inner.norm(hidden))[0]


def sharing_programs() -> st.SearchStrategy[Program]:
    """Any of its programs that run."""
    return programs_that_find(DEPTH, owners=OWNERS)


@st.composite
def programs_that_find(draw: Any, depth: int, *, owners: Mapping[int, int]) -> Program:
    """Any steps, each of which finds what it reads; half of the programs with a damped repeat."""
    path: list[int] = []
    for _ in range(draw(st.integers(1, depth + 3))):
        fit = [layer for layer in range(depth) if owners.get(layer, layer) in (layer, *path)]
        path.append(draw(st.sampled_from(fit)))
    if draw(st.booleans()):
        return Program.from_path(path, depth)
    cut = draw(st.integers(0, len(path) - 1))
    first, rest = (" ".join(map(str, part)) for part in (path[:cut], path[cut:]))
    return Program.parse(f"{first} ({rest})*2@{draw(st.sampled_from((0.25, 0.5)))}", depth)
