"""The models of the GPU benchmark: sizes of known ones with random weights, the most valuable
first.

Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_QWEN2: dict[str, Any] = dict(max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6)

# what may be measured of a model, in this order
PARTS = ("speed", "rows", "graphs", "table4", "mixed", "generate", "profile")


@dataclass(frozen=True)
class Shape:
    """A model's family and config, the GiB of its weights in bf16, and what is measured with it
    beside speed.
    """

    family: str
    config: dict[str, Any]
    gib: float
    parts: tuple[str, ...] = ()


SHAPES: dict[str, Shape] = {
    "qwen2.5-0.5b": Shape(
        "qwen2",
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
            **_QWEN2,
        ),
        0.92,
        ("rows", "graphs", "profile"),
    ),
    "llama-3.2-3b": Shape(
        "llama",
        dict(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            rope_theta=5e5,
        ),
        5.98,
        ("rows", "profile"),
    ),
    "qwen1.5-moe-a2.7b": Shape(
        "qwen2_moe",
        dict(
            hidden_size=2048,
            intermediate_size=5632,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=60,
            num_experts_per_tok=4,
            vocab_size=151936,
            tie_word_embeddings=False,
            max_position_embeddings=8192,
            rope_theta=1e6,
        ),
        26.67,
        ("table4", "profile"),
    ),
    "smollm2-135m": Shape(
        "llama",
        dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            vocab_size=49152,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rope_theta=1e5,
        ),
        0.25,
        ("mixed", "graphs", "generate"),
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
            **_QWEN2,
        ),
        14.19,
        ("rows",),
    ),
    "qwen2.5-3b": Shape(
        "qwen2",
        dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
            **_QWEN2,
        ),
        5.75,
    ),
}
TINY_MODELS = ("smollm2-135m", "qwen1.5-moe-a2.7b")  # what --tiny runs unless models are named
# What replaces these sizes with --tiny.
_TINY: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    vocab_size=200,
    max_position_embeddings=512,
    head_dim=16,
)


def config_of(name: str, tiny: bool) -> dict[str, Any]:
    """The sizes of a model."""
    config = SHAPES[name].config
    return (
        {**config, **{key: value for key, value in _TINY.items() if key in config}}
        if tiny
        else config
    )


def parts_of(name: str, tiny: bool) -> tuple[str, ...]:
    """What is measured of a model; with tiny ones everything of each."""
    return tuple(part for part in PARTS if tiny or part == "speed" or part in SHAPES[name].parts)


def that_fit(names: Iterable[str], gib: float) -> list[str]:
    """The first of these models that lie on one card together: all are prepared side by side.

    Each takes its weights, about 3 GiB for slots of 4,112 tokens, prompts and tuning, and 1 GiB for
    its process.
    """
    chosen, left = [], gib
    for name in names:
        needed = 1.05 * SHAPES[name].gib + 4
        if needed <= left:
            chosen.append(name)
            left -= needed
    return chosen
