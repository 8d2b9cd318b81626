"""What stands around a compiled model: copies, autocast, threads, wrapped models, models of several
parts.
"""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from polar_fx.backends.worker import compiler_reason
from polar_fx.compiled import compile
from polar_fx.errors import CaptureError, InputError, UnsupportedModelError
from tiny_models import make, prompts, reference

pytestmark = pytest.mark.usefixtures("traced_anew")


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_and_pickles_are_refused_with_what_to_do_instead(call: Any) -> None:
    compiled = compile(make("llama", num_hidden_layers=2), "eager", max_length=31)
    for held in (compiled, compiled.runner):
        with pytest.raises(InputError, match=r"cannot be copied or pickled.*polar_fx\.export"):
            call(held)
    with compiled.start() as talk, pytest.raises(InputError, match=r"Conversation .*branch\(\)"):
        call(talk)


def test_autocast_changes_nothing() -> None:
    model, ids = make("llama", num_hidden_layers=2), prompts(5)[0][None]
    compiled = compile(model, "eager", max_length=31, cache=False)
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
    want, tokens = compiled.forward(ids), compiled.generate(ids, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled.forward(ids), want)
        assert torch.equal(compiled.generate(ids, **options), tokens)
        assert torch.equal(compile(model, "eager", max_length=31, cache=False).forward(ids), want)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("place", ["the model", "model.layers.1"])
def test_a_forward_that_torch_compile_replaced_is_named(place: str) -> None:
    model = make("llama", num_hidden_layers=2)
    module = model if place == "the model" else model.get_submodule(place)
    module.forward = torch.compile(module.forward, backend="eager")
    with pytest.raises(
        UnsupportedModelError, match=f"forward of {place} was replaced by torch.compile"
    ):
        compile(model, "eager", max_length=31)


def test_a_forward_that_holds_on_to_the_model_is_named() -> None:
    model = make("llama", num_hidden_layers=2)
    old = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs)

    model.forward = forward
    with pytest.raises(CaptureError, match="forward of the model was replaced by a function"):
        compile(model, "eager", max_length=31)


def test_models_may_be_compiled_in_several_threads() -> None:
    models = [make("llama", num_hidden_layers=2) for _ in range(3)]
    found: list[Any] = []

    def work(model: Any) -> None:
        try:
            found.append(compile(model, "eager", max_length=31, cache=False))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [f for f in found if isinstance(f, Exception)]


def test_a_picture_tower_as_deep_as_the_text_is_not_taken_for_it() -> None:
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = make("llama", num_hidden_layers=2).config
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    ).eval()
    ids = prompts(5, vocab=98)[0]
    compiled = compile(model, "eager", max_length=31, cache=False)
    torch.testing.assert_close(
        compiled.forward(ids[None])[0], reference(model, [ids])[0], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("shared", ["mlp", "input_layernorm", "self_attn.q_proj", "mlp.act_fn"])
def test_layers_may_share_a_module(shared: str) -> None:
    model, ids = make("llama", num_hidden_layers=3), prompts(5)[0]
    model.set_submodule(f"model.layers.2.{shared}", model.get_submodule(f"model.layers.0.{shared}"))
    before = [id(m) for m in model.modules()]
    compiled = compile(model, "eager", max_length=31, cache=False)
    torch.testing.assert_close(
        compiled.forward(ids[None])[0], reference(model, [ids])[0], rtol=1e-3, atol=1e-4
    )
    assert [id(m) for m in model.modules()] == before


def test_a_layer_that_stands_twice_in_the_stack_is_refused() -> None:
    model = make("llama", num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="layer 0 of model.layers runs 2 times"):
        compile(model, "eager", max_length=31, cache=False)


@pytest.mark.parametrize("limit", [-1, 0, None])
def test_a_model_may_name_no_limit_of_positions(limit: int | None) -> None:
    model, ids = make("llama", num_hidden_layers=2), prompts(5)[0][None]
    vars(model.config)["max_position_embeddings"] = limit
    compiled = compile(model, "eager", cache=False)
    assert compiled.pool.max_length == 1024
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(compiled.generate(ids, **options), model.generate(ids, **options))


def test_a_compilers_own_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a.cpp:1: error: no such type\none\ntwo\nthree\ncompilation terminated."
    error = RuntimeError(f"C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\nold\n{said}")
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert compiler_reason(error) == (
        "RuntimeError: C++ compile error: a.cpp:1: error: no such type | two | three | "
        "compilation terminated."
    )
    monkeypatch.setattr("tempfile.tempdir", "/tmp/two words")
    assert compiler_reason(error).endswith(
        "'/tmp/two words', has a space in its name: set TMPDIR to one without"
    )
    assert compiler_reason(ValueError("short\nlong")) == "ValueError: short"


@pytest.mark.parametrize(
    ("family", "options", "length"),
    [
        ("llama", {}, 4096),
        ("llama", {"tier": "whole", "backend": "aot_inductor", "cache": True}, 1024),
        ("bloom", {}, 1024),
    ],
)
def test_rows_may_be_as_long_as_the_model_goes_where_that_costs_nothing(
    family: str, options: dict[str, Any], length: int
) -> None:
    model = make(family, num_hidden_layers=2)
    model.config.max_position_embeddings = 4096
    compiled = compile(model, **{"backend": "eager", "cache": False, **options})
    assert compiled.pool.max_length == length
    if not options:
        compiled.generate(prompts(5)[0][None], max_new_tokens=3, do_sample=False)
        assert (compiled.pool.num_bytes == 0) == (family == "llama"), "nothing is in slots"
