"""Weights that are exchanged after a model was compiled: nobody gets results of the old ones
without being told.
"""

import copy
import functools
import gc
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import WeightsReplacedError
from polar_fx.runtime.trunk import run_trunk
from tiny_models import make, prompts, reference


def _pair(family: str = "llama") -> tuple[PreTrainedModel, CompiledModel]:
    model = make(family, num_hidden_layers=2)
    return model, compile(model, "eager", max_length=31, cache=False)


@torch.no_grad()
def _assign(model: PreTrainedModel) -> None:
    model.load_state_dict({name: 2 * t for name, t in model.state_dict().items()}, assign=True)


def _new_data(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = 2 * weight.data


def _new_parameter(model: PreTrainedModel) -> None:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(32))


def _new_layer(model: PreTrainedModel) -> None:
    model.model.layers[1] = make("llama", num_hidden_layers=2).model.layers[1]


def _new_linear(model: PreTrainedModel) -> None:
    model.lm_head = torch.nn.Linear(32, 100, bias=False)


def _further_layer(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers.append(copy.deepcopy(layers[0]))


def _other_type(model: PreTrainedModel) -> None:
    model.half()


CHANGES: list[Callable[[PreTrainedModel], None]] = [
    _assign,
    _new_data,
    _new_parameter,
    _new_layer,
    _new_linear,
    _further_layer,
    _other_type,
]


@pytest.mark.parametrize("change", CHANGES)
def test_exchanged_weights_are_refused_by_every_call(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model, compiled = _pair()
    ids = prompts(5)[0][None]
    compiled.forward(ids)
    change(model)
    for call in (
        compiled.forward,
        functools.partial(compiled.generate, max_new_tokens=2, do_sample=False),
    ):
        with pytest.raises(WeightsReplacedError, match="compile the model again"):
            call(ids)
    with pytest.raises(WeightsReplacedError), run_trunk(compiled.runner, [ids[0]], num_steps=1):
        pass


def test_the_error_names_what_was_exchanged() -> None:
    model, compiled = _pair()
    _new_data(model)
    with pytest.raises(
        WeightsReplacedError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight of the model"
    ):
        compiled.forward(prompts(5)[0][None])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@torch.no_grad()
def test_weights_that_change_in_place_are_seen(family: str) -> None:
    model, compiled = _pair(family)
    ids = prompts(5)[0]
    model.load_state_dict({name: 1.25 * t for name, t in model.state_dict().items()})
    for p in model.parameters():
        p.mul_(0.9)
    torch.testing.assert_close(
        compiled.forward(ids[None])[0], reference(model, [ids])[0], rtol=1e-3, atol=1e-3
    )


def test_a_model_compiled_from_cached_tables_is_watched_as_well() -> None:
    first = make("llama", num_hidden_layers=2)
    compile(first, "eager", max_length=31)
    model = make("llama", num_hidden_layers=2)
    compiled = compile(model, "eager", max_length=31)
    compiled.forward(prompts(5)[0][None])
    _assign(model)
    with pytest.raises(WeightsReplacedError):
        compiled.forward(prompts(5)[0][None])


def test_a_tied_head_that_gets_a_weight_of_its_own_is_noticed() -> None:
    model = make("llama", num_hidden_layers=2, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    compiled = compile(model, "eager", max_length=31, cache=False)
    _new_linear(model)
    with pytest.raises(WeightsReplacedError, match=r"^lm_head"):
        compiled.forward(prompts(5)[0][None])


def test_frequencies_that_a_model_makes_itself_are_no_weights() -> None:
    """Some models make themselves other rotary frequencies for longer prompts; compiled programs
    have those of the trace.
    """
    model, compiled = _pair()
    want = compiled.forward(prompts(5)[0][None])
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq / 2, persistent=False)
    assert torch.equal(compiled.forward(prompts(5)[0][None]), want)


def test_a_model_that_is_gone_is_no_hindrance() -> None:
    model, compiled = _pair()
    want = compiled.forward(prompts(5)[0][None])
    del model
    gc.collect()
    assert torch.equal(compiled.forward(prompts(5)[0][None]), want)
