"""Facts of models: what makes another model, and what has no fingerprint at all."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_moe import modeling_qwen2_moe

from cached_models import Patch, compile_cached, small, traces
from polar_fx.library.model_facts import model_facts
from polar_fx.store import ArtifactStore
from tiny_models import prompts, reference


def _attribute(patch: Patch) -> PreTrainedModel:
    model = small()
    model.model.layers[1].self_attn.scaling = 0.9
    return model


def _config(patch: Patch) -> PreTrainedModel:
    model = small("gemma2")
    model.config.final_logit_softcapping = 2.0
    return model


def _class(patch: Patch) -> PreTrainedModel:
    forward = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * forward(self, x))
    return small()


def _function(patch: Patch) -> PreTrainedModel:
    rotate = modeling_llama.apply_rotary_pos_emb
    patch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, **kwargs: rotate(q, k, cos, -sin, **kwargs),
    )
    return small()


def _function_of_a_function(patch: Patch) -> PreTrainedModel:
    patch.setattr(modeling_llama, "rotate_half", lambda x: x.flip(-1))
    return small()


def _tied(patch: Patch) -> PreTrainedModel:
    model = small()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _swapped(patch: Patch) -> PreTrainedModel:
    """Another module class in one place."""
    model = small()
    model.model.layers[1].mlp.act_fn = nn.GELU()
    return model


CHANGES = (_attribute, _config, _class, _function, _function_of_a_function, _tied, _swapped)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """Holds the tables of the models that the changes start from."""
    store = ArtifactStore(tmp_path_factory.mktemp("known") / "artifacts", limit_bytes=0)
    for family in ("llama", "gemma2"):
        compile_cached(small(family), store)
    return store


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_a_changed_model_is_traced_and_computes_what_it_computes_now(
    change: Callable[[Patch], PreTrainedModel], known: ArtifactStore, monkeypatch: Patch
) -> None:
    (ids,) = prompts(9)
    with monkeypatch.context() as patch:
        model = change(patch)
        compiled = compile_cached(model, known)
        assert compiled.library.is_traced
        (want,) = reference(model, [ids])
        torch.testing.assert_close(compiled.forward(ids[None])[0], want, rtol=0, atol=1e-4)
        assert not traces(model, known), "the changed model has a table, too"
    (before,) = reference(small(model.config.model_type), [ids])
    assert not torch.allclose(want, before, atol=1e-3), "the change shows"
    assert not traces(small(model.config.model_type), known), "undone, the first table serves again"


def _patched(owner: Any, name: str, *, value: Any) -> Callable[[Patch], PreTrainedModel]:
    def variant(patch: Patch) -> PreTrainedModel:
        patch.setattr(owner, name, value, raising=False)
        return small()

    return variant


def _changed(
    change: Callable[[PreTrainedModel], Any], family: str = "llama"
) -> Callable[[Patch], PreTrainedModel]:
    def variant(patch: Patch) -> PreTrainedModel:
        model = small(family)
        change(model)
        return model

    return variant


MLP = modeling_llama.LlamaMLP


def _times(factor: float) -> Callable[..., Any]:
    return lambda self, x: factor * self.down_proj(x)  # closes over a number


def _keyword(factor: float) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor, *, by: float = factor) -> Any:
        return by * self.down_proj(x)

    return forward


def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As decorators do: the code that matters is closed over, and the wrapper looks like
    transformers' own.
    """

    @functools.wraps(MLP.forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, x)

    return wrapper


GAIN = 1.0


def _reads_a_global(self: Any, x: Tensor) -> Any:
    return GAIN * _helper(self.down_proj(x))


def _helper(x: Tensor) -> Tensor:
    return x


def _with_global(name: str, value: Any) -> Callable[[Patch], PreTrainedModel]:
    def variant(patch: Patch) -> PreTrainedModel:
        patch.setitem(globals(), name, value)
        patch.setattr(MLP, "forward", _reads_a_global)
        return small()

    return variant


def _share(name: str) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.gate_proj = getattr(model.model.layers[0].mlp, name)

    return change


def _default_dtype(patch: Patch) -> PreTrainedModel:
    model = small()
    patch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    return model


def _laid_out(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())


# name -> two models that differ in one thing only
PAIRS: dict[str, tuple[Callable[[Patch], PreTrainedModel], Callable[[Patch], PreTrainedModel]]] = {
    "a number that a patch closes over": (
        _patched(MLP, "forward", value=_times(2.0)),
        _patched(MLP, "forward", value=_times(3.0)),
    ),
    "a number in what a patch wraps": (
        _patched(MLP, "forward", value=_wrapped(lambda s, x: 2.0 * s.down_proj(x))),
        _patched(MLP, "forward", value=_wrapped(lambda s, x: 3.0 * s.down_proj(x))),
    ),
    "a function in what a patch wraps": (
        _patched(MLP, "forward", value=_wrapped(lambda s, x: s.down_proj(x).sin())),
        _patched(MLP, "forward", value=_wrapped(lambda s, x: s.down_proj(x).cos())),
    ),
    "a default": (
        _patched(MLP, "forward", value=lambda s, x, by=2.0: x),
        _patched(MLP, "forward", value=lambda s, x, by=3.0: x),
    ),
    "a keyword's default": (
        _patched(MLP, "forward", value=_keyword(2.0)),
        _patched(MLP, "forward", value=_keyword(3.0)),
    ),
    "a global that a patch reads": (_with_global("GAIN", 1.0), _with_global("GAIN", 2.0)),
    "a function that a patch calls": (
        _with_global("_helper", _helper),
        _with_global("_helper", lambda x: -x),
    ),
    "a set in the code": (
        _patched(MLP, "forward", value=lambda s, x: x if "a" in {"a", "b"} else -x),
        _patched(MLP, "forward", value=lambda s, x: x if "a" in {"b", "c"} else -x),
    ),
    "a constant of a class": (_patched(MLP, "gain", value=1.0), _patched(MLP, "gain", value=2.0)),
    "a constant of a modeling file": (
        _patched(modeling_llama, "GAIN", value=1.0),
        _patched(modeling_llama, "GAIN", value=2.0),
    ),
    "what a jit or cache wraps": (
        _patched(modeling_llama, "rotate_half", value=functools.lru_cache(lambda x: x)),
        _patched(modeling_llama, "rotate_half", value=functools.lru_cache(lambda x: -x)),
    ),
    "which attention": (
        _changed(lambda m: None),
        _changed(lambda m: m.set_attn_implementation("eager")),
    ),
    "which experts": (
        _changed(lambda m: m.set_experts_implementation("grouped_mm"), "qwen2_moe"),
        _changed(lambda m: m.set_experts_implementation("eager"), "qwen2_moe"),
    ),
    "which module is there twice": (_changed(_share("gate_proj")), _changed(_share("up_proj"))),
    "a parameter's layout": (_changed(lambda m: None), _changed(_laid_out)),
    "a parameter's dtype": (_changed(lambda m: None), _changed(lambda m: m.lm_head.double())),
    "the arguments of an activation": (
        _changed(
            lambda m: setattr(
                m.model.layers[0].mlp,
                "act",
                functools.partial(nn.functional.gelu, approximate="tanh"),
            )
        ),
        _changed(
            lambda m: setattr(
                m.model.layers[0].mlp,
                "act",
                functools.partial(nn.functional.gelu, approximate="none"),
            )
        ),
    ),
    "torch's default dtype": (_changed(lambda m: None), _default_dtype),
}


@pytest.mark.parametrize("name", PAIRS)
def test_models_that_differ_in_one_thing_have_other_fingerprints(
    name: str, monkeypatch: Patch
) -> None:
    seen = []
    for variant in (*PAIRS[name], *PAIRS[name]):
        with monkeypatch.context() as patch:
            seen.append(model_facts(variant(patch)))
    assert seen[0] == seen[2] and seen[1] == seen[3], "and equal ones have the same"
    assert seen[0] != seen[1]


def test_every_modeling_file_of_the_changes_is_left_as_it_was() -> None:
    """The tests above patch classes for good if their patches are not undone."""
    for module in (modeling_llama, modeling_gemma2, modeling_qwen2_moe):
        own = [
            v
            for v in vars(module).values()
            if isinstance(v, type) and v.__module__ == module.__name__
        ]
        assert own and all(
            f.__module__ == module.__name__
            for c in own
            if (f := vars(c).get("forward")) is not None
        )


class _Scaled(nn.Parameter):
    """A tensor of a class of its own, which may do anything when it is used."""


def _own_tensor(model: PreTrainedModel) -> None:
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = weight.as_subclass(_Scaled)  # type: ignore[assignment]


def _forward_set(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def _method_set(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: 2 * MLP.forward(self, x), mlp)


def _tensor_aside(model: PreTrainedModel) -> None:
    model.model.layers[1].gain = torch.ones(3)


def _object_aside(model: PreTrainedModel) -> None:
    model.model.layers[1].helper = object()


UNKNOWN = (_own_tensor, _forward_set, _method_set, _tensor_aside, _object_aside)


@pytest.mark.parametrize(
    "change",
    [*UNKNOWN[:-1], pytest.param(UNKNOWN[-1], marks=pytest.mark.slow)],
    ids=lambda c: c.__name__.strip("_"),
)
def test_what_has_no_fingerprint_is_traced_every_time_and_kept_nowhere(
    change: Callable[[PreTrainedModel], None], store: ArtifactStore
) -> None:
    (ids,) = prompts(9)
    for _ in range(2):
        model = small()
        change(model)
        compiled = compile_cached(model, store)
        assert compiled.library.is_traced and store.entries() == []
        torch.testing.assert_close(
            compiled.forward(ids[None])[0], reference(model, [ids])[0], rtol=0, atol=1e-4
        )
