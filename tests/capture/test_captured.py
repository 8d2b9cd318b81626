"""The captured graph: its inputs, its geometry, its independence of the model's state, and the
check that guards it.
"""

import copy
import itertools
from typing import Any

import pytest
import torch

from polar_fx.capture import CapturedModel, KvSpec, attention_variants, capture
from polar_fx.capture.checked import capture_checked, max_difference
from polar_fx.errors import CaptureError, UnsupportedModelError
from polar_fx.library import LayerLibrary
from polar_fx.passes.text import graph_text
from polar_fx.program import Program
from tiny_models import make, prompts, reference, run_rows, snapshot, tiny
from versions import since_transformers


def _worst(model: Any, captured: CapturedModel) -> float:
    library = LayerLibrary(captured)
    rows = prompts(9, 6)
    got = run_rows(library, Program.identity(library.depth), rows=rows, prefill=(7, 3))
    return max(float((a - b).abs().max()) for a, b in zip(got, reference(model, rows), strict=True))


# ---------------------------------------------------------------------------------------- the graph


def test_inputs_are_as_documented() -> None:
    captured = tiny("llama").captured
    placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
    names = [
        "input_ids",
        "positions",
        "kv_index",
        *(f"kv_{i}_{part}" for i in range(4) for part in (0, 1)),
    ]
    assert [n.target for n in placeholders] == names
    assert [n.meta["role"] for n in placeholders] == ["input"] * 3 + ["kv"] * 8
    kept = [(n.meta["slot"], n.meta["part"]) for n in placeholders[3:]]
    assert kept == list(itertools.product(range(4), (0, 1)))
    ids, positions, index, *kv = (n.meta["val"] for n in placeholders)
    (batch, tokens), (length,) = ids.shape, index.shape
    # three free axes
    assert {str(s) for s in (batch, tokens, length)} == {str(batch), str(tokens), str(length)}
    assert all(isinstance(s, torch.SymInt) for s in (batch, tokens, length))
    assert (
        tuple(positions.shape) == (batch, tokens)
        and ids.dtype == positions.dtype == index.dtype == torch.int64
    )
    assert {tuple(map(str, k.shape)) for k in kv} == {(str(batch), "2", str(length), "8")}
    (output,) = captured.graph_module.graph.find_nodes(op="output")
    logits = output.args[0].meta["val"]
    assert (
        tuple(map(str, logits.shape)) == (str(batch), str(tokens), "100")
        and logits.dtype == torch.float32
    )


def test_weights_are_attributes_under_the_models_own_names() -> None:
    t = tiny("llama")
    held = dict(t.captured.graph_module.named_parameters())
    assert held.keys() == dict(t.model.named_parameters()).keys()
    assert all(t.model.get_parameter(name) is p for name, p in held.items())


def test_facts_about_the_model() -> None:
    captured = tiny("llama").captured
    assert (captured.depth, captured.layer_path) == (4, "model.layers")
    assert (captured.dtype, captured.device) == (torch.float32, torch.device("cpu"))
    assert captured.seconds > 0


def test_kv_geometry() -> None:
    spec = KvSpec(heads=2, key_size=16, value_size=8, dtype=torch.bfloat16)
    assert spec.shapes(3, 10) == ((3, 2, 10, 16), (3, 2, 10, 8))
    assert spec.bytes_per_token() == 2 * (16 + 8) * 2
    assert tiny("llama").captured.kv_specs == (KvSpec(2, 8, 8, torch.float32),) * 4
    # latents, and rotary keys
    assert tiny("deepseek_v3").captured.kv_specs[0] == KvSpec(1, 8, 4, torch.float32)


def test_every_operator_of_a_layer_knows_its_layer() -> None:
    nodes = tiny("gemma3_text").captured.graph_module.graph.nodes
    layers = [n.meta["layer"] for n in nodes if n.op == "call_function"]
    assert set(layers) == {None, 0, 1, 2}
    numbered = [layer for layer in layers if layer is not None]
    assert numbered == sorted(numbered)


def test_two_captures_give_the_same_graph() -> None:
    again = capture(make("llama"))
    assert graph_text(again.graph_module) == graph_text(tiny("llama").captured.graph_module)


@pytest.mark.parametrize(
    ("batch", "tokens", "length"), [(1, 1, 1), (1, 3, 8), (2, 1, 16), (3, 5, 5), (7, 7, 7)]
)
def test_one_graph_for_every_shape(batch: int, tokens: int, length: int) -> None:
    t = tiny("llama")
    ids = torch.stack(prompts(*[tokens] * batch))
    positions = torch.arange(tokens).expand(batch, tokens)
    kv = [torch.zeros(s) for spec in t.captured.kv_specs for s in spec.shapes(batch, length)]
    with torch.no_grad():
        got = t.captured.graph_module(ids, positions, torch.arange(length), *kv)
        torch.testing.assert_close(got, t.model(ids).logits, rtol=0, atol=1e-4)


class Long(torch.nn.Module):
    """A norm that treats more tokens than `most` in another way."""

    def __init__(self, inner: torch.nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x if x.shape[1] <= self.most else 2 * x)


def test_sizes_that_no_call_has_may_be_a_case_of_their_own() -> None:
    """More tokens than a row may have."""
    model = make("llama", num_hidden_layers=1)
    norm = model.model.norm
    model.model.norm = Long(norm, 256)
    assert _worst(model, capture(model)) < 1e-4
    model.model.norm = Long(norm, 255)
    with pytest.raises(CaptureError, match="its code fixes the number of rows, tokens or KV"):
        capture(model)


@since_transformers("5.24")
def test_slots_shorter_than_any_may_be_a_case_of_their_own() -> None:
    doge = make("doge", num_hidden_layers=1, head_dim=8, keep_window_size=8)
    assert _worst(doge, capture(doge)) < 1e-4


# --------------------------------------------------------------------------- the state of the model


def test_training_mode_does_not_show() -> None:
    model = make("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    before = snapshot(model)
    captured = capture_checked(model)
    assert snapshot(model) == before and model.training
    assert "dropout" not in graph_text(LayerLibrary(captured).graph_module)
    assert _worst(model.eval(), captured) < 1e-4


def test_gradients_do_not_show() -> None:
    """Captured under either grad mode, from weights that require gradients or not, the graph is
    one.
    """
    model = make("llama").requires_grad_(False)
    with torch.enable_grad():
        frozen = capture(model)
    assert graph_text(frozen.graph_module) == graph_text(tiny("llama").captured.graph_module)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make("llama").to(dtype)
    captured = capture_checked(model)
    assert captured.dtype == dtype and captured.kv_specs[0].dtype == dtype
    worst, scale = max_difference(model, captured)
    assert worst <= 4 * torch.finfo(dtype).eps ** 0.75 * scale


def test_tied_embeddings_stay_tied() -> None:
    model = make("llama", tie_word_embeddings=True)
    library = LayerLibrary(capture(model))
    embedding = model.get_input_embeddings().weight
    assert any(w.data_ptr() == embedding.data_ptr() for w in library.prologue.weights)
    assert any(w.data_ptr() == embedding.data_ptr() for w in library.epilogue.weights)
    with torch.no_grad():
        embedding.mul_(2)  # the graph holds the tensor, not a copy: a later edit shows
    assert _worst(model, library.captured) < 1e-3


def test_a_deep_copy_of_a_captured_model_can_be_captured() -> None:
    """Capture leaves nothing behind that a copy, or a second capture, could trip over."""
    t = tiny("llama")
    assert graph_text(capture(copy.deepcopy(t.model)).graph_module) == graph_text(
        t.captured.graph_module
    )


def test_a_forward_hook_is_refused() -> None:
    """It would run on the tracer's symbolic tensors now, and never again."""
    model, seen = make("llama"), []
    handle = model.model.layers[1].register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with pytest.raises(
        UnsupportedModelError, match="model.layers.1 has a forward hook.*; remove the hooks first"
    ):
        capture(model)
    assert not seen
    handle.remove()
    capture(model)
    model.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(UnsupportedModelError, match="the model has a forward hook"):
        capture(model)


def test_an_encoder_is_captured_as_a_decoder_alone() -> None:
    with pytest.raises(
        UnsupportedModelError, match="BertSelfAttention attends to the tokens after"
    ):
        capture(make("bert", num_hidden_layers=1))
    capture_checked(make("bert", num_hidden_layers=1, is_decoder=True))


def test_hooks_of_transformers_itself_are_no_obstacle() -> None:
    """Asking a model for its hidden states leaves recording hooks on it, for good."""
    model = make("llama")
    model(torch.stack(prompts(3)), output_hidden_states=True)
    assert any(m._forward_hooks for m in model.modules())
    assert _worst(model, capture_checked(model)) < 1e-4


def test_state_that_is_written_through_a_part_of_it_is_refused() -> None:
    class Counting(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls: torch.Tensor
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, _ = self.calls.split(1)
            first += 1
            return self.inner(x) * first

    model = make("llama", num_hidden_layers=1)
    model.model.norm = Counting(model.model.norm)
    with pytest.raises(
        UnsupportedModelError, match="writes to model.norm.calls; a model that keeps state"
    ):
        capture(model)


def test_weights_that_were_never_loaded() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match="weights of LlamaForCausalLM are on meta; load them all onto one device",
    ):
        capture(make("llama").to("meta"))


def test_weights_on_two_devices() -> None:
    model = make("llama")
    model.model.layers[2].to("meta")
    with pytest.raises(UnsupportedModelError, match="are on cpu, meta; load them"):
        capture(model)


def test_other_attention_implementations() -> None:
    assert attention_variants(make("llama")) == ("polar_fx_sdpa", "polar_fx_eager")
    assert attention_variants(make("llama", attn_implementation="eager")) == ("polar_fx_eager",)
    model = make("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(
        UnsupportedModelError, match="'flex_attention' cannot be traced; load .*'sdpa' or 'eager'"
    ):
        capture(model)


# ---------------------------------------------------------------------------------------- the check


def test_the_check_sees_a_wrong_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One literal changed in one layer: the square root's epsilon becomes 0.1."""

    def wrong(model: Any, attention: str | None = None) -> CapturedModel:
        captured = capture(model, attention)
        epsilon = next(
            n
            for n in captured.graph_module.graph.nodes
            if n.meta.get("layer") == 1 and 1e-6 in n.args
        )
        epsilon.args = (epsilon.args[0], 0.1)
        captured.graph_module.recompile()
        return captured

    monkeypatch.setattr("polar_fx.capture.checked.capture", wrong)
    with pytest.raises(
        CaptureError,
        match="LlamaForCausalLM is not supported: traced with .* logits differ .* by .*; use a "
        "model",
    ):
        capture_checked(make("llama"))
    capture_checked(make("llama"), check=False)


@pytest.mark.parametrize("what", ["mask", "positions"])
def test_the_check_sees_a_wrong_row(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A mask that hides nothing; masks that follow the positions of the first row, right unless
    rows differ.
    """
    from polar_fx.capture import extension as module
    from polar_fx.capture.row_values import Past

    original, cache = module._mask, module._TracingCache
    if what == "mask":
        monkeypatch.setattr(
            module,
            "_mask",
            lambda *a, **kw: original(*a, **{**kw, "mask_function": lambda b, h, q, k: k >= 0 * q}),
        )
    else:
        monkeypatch.setattr(
            cache,
            "get_query_offset",
            lambda self, layer_idx=0: Past(self.positions[:1].expand_as(self.positions), None),
        )
    with pytest.raises(CaptureError, match="logits differ"):
        capture_checked(make("llama"))


def test_the_check_goes_by_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all logits are below 0.3, a third of the largest is no rounding."""
    model = make("cohere").to(torch.bfloat16)
    worst, scale = max_difference(model, capture(model))
    assert worst < 0.02 * scale < 0.006
    monkeypatch.setattr("polar_fx.capture.checked.max_difference", lambda *_: (0.33 * scale, scale))
    with pytest.raises(CaptureError, match="logits differ"):
        capture_checked(model)


def test_the_second_attention_variant_is_tried() -> None:
    """Falcon compares the name of its attention with "sdpa" itself: only the eager trace computes
    what it does.
    """
    model = make("falcon")
    first, second = attention_variants(model)
    assert max_difference(model, capture(model, first))[0] > 1e-2
    assert max_difference(model, capture(model, second))[0] < 1e-4
    assert max_difference(model, tiny("falcon").captured)[0] < 1e-4


def test_a_failing_export_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("torch.export.export", fail)
    with pytest.raises(
        CaptureError, match="could not trace LlamaForCausalLM: its code fixes the number of rows"
    ) as caught:
        capture(make("llama"))
    assert isinstance(caught.value.__cause__, AssertionError)


def test_the_order_of_a_set_in_the_model_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 loops over the set of its layers' types, in an order that is another one in every
    process; records, predictors and compiled regions are known by the table's fingerprint.
    """
    from transformers.models.gemma3 import modeling_gemma3

    def table_of(backwards: bool) -> str:
        def in_order(names: Any) -> list[Any]:
            return sorted(dict.fromkeys(names), reverse=backwards)

        monkeypatch.setattr(modeling_gemma3, "set", in_order, raising=False)
        return LayerLibrary(capture(make("gemma3_text"))).table.to_json()

    assert table_of(False) == table_of(True)
