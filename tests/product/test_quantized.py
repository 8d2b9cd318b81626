"""Weights held as integers, by torchao or by `load(..., quantize=...)`, pass through: integers and
scales are weights like any other.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from polar_fx.compiled import CompiledModel, compile
from polar_fx.passes.quantized_linear import QuantizedLinear
from polar_fx.program import Program
from polar_fx.quantized import quantize_weights
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts, reference


def _model() -> PreTrainedModel:
    return make("llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def quantized() -> PreTrainedModel:
    """A tiny model with torchao's int8 weights in its layers."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = _model()
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    return model


def test_int8_weights_of_torchao_run_programs_and_stay_int8(
    quantized: PreTrainedModel, tmp_path: Any
) -> None:
    compiled = compile(quantized, "eager", max_length=31, cache=ArtifactStore(tmp_path))
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
    # what regions on the CPU run for them
    streamed = QuantizedLinear().run(compiled.library.bodies["layer_kind_0"])
    assert streamed.counts == {"linears rewritten": 7, "calls": 7}
    _check_kv_law(compiled, rows[0])


@pytest.mark.slow
def test_compiled_regions_over_int4_weights_give_what_the_model_gives() -> None:
    model = quantize_weights(_model(), "int4")
    compiled = compile(model, "aot_inductor", max_length=31)
    rows = prompts(9)
    (want,) = reference(model, rows)
    assert (compiled.forward(rows[0][None])[0] - want).abs().max() < 1e-3
    _check_kv_law(compiled, rows[0])


def _check_kv_law(compiled: CompiledModel, row: torch.Tensor) -> None:
    """Prefill and then decoding give what one call over all tokens gives."""
    program = Program.parse("0 (1-2)*2 3", 4)
    with compiled.session(program, 1) as session:
        first = compiled.prefill(program, session, [row])[0]
        after = compiled.decode(program, session, torch.tensor([7]))[0]
    every = compiled.forward(torch.cat([row, torch.tensor([7])])[None], program=program)[0]
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
