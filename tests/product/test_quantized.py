"""Weights that are quantized by torchao pass through: integers and scales are weights like any
other.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from polar_fx.compiled import compile
from polar_fx.program import Program
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts, reference


@pytest.fixture(scope="module")
def quantized() -> PreTrainedModel:
    """A tiny model with int8 weights in its layers."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = copy.deepcopy(make("llama", hidden_size=64, intermediate_size=128))
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_inductor"])
def test_int8_weights_run_programs_and_stay_int8(
    backend: str, quantized: PreTrainedModel, tmp_path: Any
) -> None:
    compiled = compile(quantized, backend, max_length=31, cache=ArtifactStore(tmp_path))
    rows = prompts(9)
    (want,) = reference(quantized, rows)
    assert (compiled.forward(rows[0][None])[0] - want).abs().max() < 1e-3
    weights = compiled.library.layers[0].weights
    assert sum(w.dtype == torch.int8 for w in weights) == 7
    assert all(w.dtype == torch.int8 for w in weights if w.dim() == 2 and w.shape[1] > 1)
    own = {
        t.data_ptr()
        for m in quantized.modules()
        for p in m._parameters.values()
        if p is not None
        for t in _inner(p)
    }
    assert {w.data_ptr() for w in weights} <= own, "a weight was copied"
    program = Program.parse("0 (1-2)*2 3", 4)
    with compiled.session(program, 1) as session:
        first = compiled.prefill(program, session, rows)[0]
        after = compiled.decode(program, session, torch.tensor([7]))[0]
    every = compiled.forward(torch.cat([rows[0], torch.tensor([7])])[None], program=program)[0]
    assert (torch.stack([first, after]) - every[-2:]).abs().max() < 1e-3


def _inner(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that a tensor subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [
        t for name in names if (inner := getattr(tensor, name)) is not None for t in _inner(inner)
    ]


def test_the_library_of_quantized_weights_is_traced_every_time(
    quantized: PreTrainedModel, tmp_path: Any
) -> None:
    store = ArtifactStore(tmp_path)
    for _ in range(2):
        assert compile(quantized, "eager", max_length=31, cache=store).library.is_traced
    assert store.entries() == []
