"""Small models compiled from a store, and whether that traced them."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from polar_fx.compiled import CompiledModel, compile
from polar_fx.store import ArtifactStore
from tiny_models import make

Patch = pytest.MonkeyPatch


def small(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    return make(family, num_hidden_layers=2, **overrides)


def compile_cached(
    model: PreTrainedModel, store: ArtifactStore | bool, **options: Any
) -> CompiledModel:
    return compile(model, "eager", max_length=31, cache=store, **options)


def traces(model: PreTrainedModel, store: ArtifactStore, **options: Any) -> bool:
    """Whether compiling traces the model, not finding its table."""
    return compile_cached(model, store, **options).library.is_traced
