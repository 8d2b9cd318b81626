"""Every family: the identity program is the model itself, on the model's own weights, leaving the
model alone.

Nothing in polar_fx knows a family by name; this is where the claim is tested.
"""

import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from polar_fx.capture import capture
from polar_fx.capture.checked import capture_checked
from polar_fx.errors import CaptureError, UnsupportedModelError
from polar_fx.program import Program
from slow_cases import some_slow
from tiny_models import FAMILIES, WINDOW, make, prompts, reference, run_rows, snapshot, tiny

pytestmark = pytest.mark.usefixtures("traced_anew")

# How many distinct layer graphs a family has, where it is not one: the layers differ in more than
# their weights.
KINDS = {
    "cohere2": 2,  # rotary in sliding layers only
    "deepseek_v3": 2,  # dense first, then experts
    "exaone4": 2,  # rotary in sliding layers only
    "gemma4_text": 2,  # head sizes of sliding and full layers
    "jetmoe": 2,  # equal, but the first layer's sizes are traced before the symbols are simplified
    "smollm3": 2,  # every fourth layer without rotary
}

each_family = pytest.mark.parametrize("family", some_slow(FAMILIES))


@each_family
def test_identity_is_the_model(family: str) -> None:
    """A ragged batch, prefill and decode, against each row alone in the model: masks, positions,
    rotary and KV slots.
    """
    model, library = tiny(family).model, tiny(family).library
    rows = prompts(14, 9)
    got = run_rows(library, Program.identity(library.depth), rows=rows, prefill=(11, 6))
    for mine, want in zip(got, reference(model, rows), strict=True):
        assert want.abs().max() > 0.1, "logits too small to tell anything"
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-4)


@each_family
def test_the_model_is_shared_and_unchanged(family: str) -> None:
    t = tiny(family)
    assert snapshot(t.model) == t.before
    own = {x.data_ptr() for x in (*t.model.parameters(), *t.model.buffers())}
    held = dict(t.library.graph_module.named_parameters())
    assert held and {p.data_ptr() for p in held.values()} <= own, "a parameter was copied"
    assert {w.data_ptr() for call in t.library.layers for w in call.weights if w.dim() > 1} <= own


@each_family
def test_layers_of_a_kind_share_a_graph(family: str) -> None:
    library = tiny(family).library
    assert len(library.layers) == library.depth == len(tiny(family).captured.kv_specs)
    assert len({call.target for call in library.layers}) == KINDS.get(family, 1)


def test_a_literal_that_differs_a_layer_makes_a_kind_a_layer() -> None:
    """GPT-2 can divide attention by the layer number: a constant in the graph, not a weight."""
    from polar_fx.library import LayerLibrary

    library = LayerLibrary(capture(make("gpt2", scale_attn_by_inverse_layer_idx=True)))
    assert len({call.target for call in library.layers}) == library.depth


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "exaone4"]
)
def test_the_sliding_window_matters(family: str) -> None:
    """Else the tests above would not see a wrong mask."""
    row = prompts(14)
    near, far = reference(make(family), row)[0], reference(make(family, sliding_window=64), row)[0]
    torch.testing.assert_close(near[:WINDOW], far[:WINDOW], rtol=0, atol=1e-4)
    assert (near - far)[WINDOW:].abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rope_type": "linear", "factor": 2.0}, id="linear"),
        pytest.param(
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, id="yarn"
        ),
        pytest.param(
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            id="llama3",
        ),
    ],
)
def test_scaled_rotary(options: dict[str, Any]) -> None:
    model = make("llama", num_hidden_layers=1, rope_parameters={"rope_theta": 10000.0, **options})
    assert _worst(model, 24) < 1e-4


@pytest.mark.parametrize("tokens", [12, 24])
def test_rotary_frequencies_that_depend_on_the_length(tokens: int) -> None:
    """Phi's longrope writes its frequencies into a buffer on every call; the graph computes them
    and writes nothing.
    """
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    rope["original_max_position_embeddings"] = 16
    model = make(
        "phi3", num_hidden_layers=1, rope_parameters=rope, original_max_position_embeddings=16
    )
    assert _worst(model, tokens) < 1e-4


def test_rotary_frequencies_of_some_layers_that_depend_on_the_length() -> None:
    """Layers of one type choose their frequencies by the length, those of another do not."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    longer = {**plain, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longer["original_max_position_embeddings"] = 16
    model = make(
        "gemma3_text", rope_parameters={"sliding_attention": plain, "full_attention": longer}
    )
    assert max(_worst(model, tokens) for tokens in (12, 24)) < 1e-4


def _worst(model: PreTrainedModel, tokens: int) -> float:
    from polar_fx.library import LayerLibrary

    library = LayerLibrary(capture(model))
    rows = prompts(tokens)
    got = run_rows(library, Program.identity(library.depth), rows=rows, prefill=[tokens])
    return float((got[0] - reference(model, rows)[0]).abs().max())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attn_implementation": "eager"}),
        ("falcon", {"new_decoder_architecture": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("llama", {"tie_word_embeddings": True}),
        (
            "llama",
            {
                "output_hidden_states": True,
                "output_attentions": True,
                "return_dict": False,
                "use_cache": False,
            },
        ),
        ("mixtral", {"output_router_logits": True}),
    ],
)
def test_options_of_a_config(family: str, options: dict[str, Any]) -> None:
    capture_checked(make(family, **options))


# ---------------------------------------------------------------------------------- what is refused

_STATE = "use one that hands what its layers keep to its cache"
_CURRENT = "use a model whose code follows transformers' current cache and mask interfaces"

REFUSED = {
    "rwkv": (
        {},
        "RwkvForCausalLM changes its weights in its forward pass",
        "pass a model that only reads them",
    ),
    "minimax": ({}, "MiniMaxForCausalLM does not run with one slot per layer", _STATE),
    # code that computes with the length of the cache as a number
    "mpt": (
        dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
        "MptForCausalLM does not run with one slot per layer",
        "use one whose positions are the same sums for any row",
    ),
    "gpt_neo": (
        dict(num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=8),
        "GPTNeoForCausalLM is not supported",
        _CURRENT,
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_reason_and_remedy(family: str) -> None:
    options, reason, remedy = REFUSED[family]
    model = make(family, **options)
    before = snapshot(model)
    with pytest.raises(
        (UnsupportedModelError, CaptureError), match=f"{re.escape(reason)}.*{remedy}"
    ):
        capture_checked(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("minimax", "its MiniMaxModel model asks its cache for more than keys and values"),
        (
            "mpt",
            "its MptAttention transformer.blocks.0.attn computes with how many tokens came before",
        ),
        ("deepseek_v2", "the model itself cannot run two tokens, with no cache either: The size"),
    ],
)
def test_a_reason_names_what_the_model_has(family: str, part: str) -> None:
    options = REFUSED[family][0] if family in REFUSED else {}
    with pytest.raises((UnsupportedModelError, CaptureError), match=re.escape(part)):
        capture_checked(make(family, **options))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
    with pytest.raises(
        UnsupportedModelError,
        match="T5ForConditionalGeneration is an encoder-decoder; pass a decoder-only",
    ):
        capture(T5ForConditionalGeneration(config))


def test_a_model_without_head_is_refused() -> None:
    headless = AutoModel.from_config(make("llama").config)
    with pytest.raises(
        UnsupportedModelError,
        match="LlamaModel has no language-model head; load it with AutoModelForCausalLM",
    ):
        capture(headless)


@pytest.mark.parametrize(
    "value", [torch.nn.Linear(2, 2), "gpt2", None], ids=["module", "text", "none"]
)
def test_not_a_transformers_model(value: Any) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=f"expected a transformers PreTrainedModel, got {type(value).__name__}; load",
    ):
        capture(value)


def test_a_model_without_layers_is_refused() -> None:
    class Flat(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.embed = torch.nn.Embedding(8, 4)
            self.lm_head = torch.nn.Linear(4, 8)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

    with pytest.raises(
        UnsupportedModelError,
        match=r"Flat has no stack of layers \(no nn.ModuleList\); pass a decoder-only",
    ):
        capture(Flat(PreTrainedConfig()))


def test_a_layer_that_keeps_state_is_refused() -> None:
    """A running count in a buffer: the second run of a repeated layer would see what the first
    left.
    """

    class Counting(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls: torch.Tensor
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls[0] += 1
            return self.inner(x) * self.calls[0]

    model = make("llama", num_hidden_layers=1)
    model.model.norm = Counting(model.model.norm)
    with pytest.raises(
        UnsupportedModelError, match="writes to model.norm.calls; a model that keeps state"
    ):
        capture(model)
