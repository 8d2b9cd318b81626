"""Models whose weights are held as integers: how near they are, at what size, and what is refused.

Shape legend: N rows of a weight, K their size, T tokens.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import polar_fx
from plain_loop import plain_logits
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, ModelWarning, UnsupportedModelError
from polar_fx.models import named_or_loaded
from polar_fx.passes.quantized_linear import dequantize
from polar_fx.program import Program
from polar_fx.quantized import QuantizedLinear, integers_of, quantize_weights
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts

WAYS = ("int8", "int4")
# 96 is a block and a half of the kernel's
_SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
each_way = pytest.mark.parametrize("way", WAYS)


def _model(**options: Any) -> PreTrainedModel:
    return make("llama", **_SIZES, **options)


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a quantized model with HuggingFace's own layers, on the weights that its integers
    stand for.
    """
    plain = _model(tie_word_embeddings=model.config.tie_word_embeddings)
    with torch.no_grad():
        for name, mine in model.named_modules():
            if isinstance(mine, QuantizedLinear):
                plain.get_submodule(name).weight.copy_(dequantize(*_parts(mine)))  # type: ignore[operator]
    return plain


def _parts(linear: QuantizedLinear) -> list[torch.Tensor]:
    parts = [linear.integers, linear.scale, linear.zero]
    return [p for p in parts if p is not None]


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_is_off_by_half_a_step_at_most(way: str, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    parts = integers_of(weight, way)
    assert parts[0].numel() * parts[0].element_size() == weight.numel() // (
        1 if way == "int8" else 2
    )
    wide = [p if p.dtype in (torch.int8, torch.uint8) else p.float() for p in parts]
    off = (dequantize(*wide) - weight.float()).abs()
    step = parts[1].float().flatten(1).repeat_interleave(96 // parts[1].shape[1], 1)
    # the smallest and largest number may be off by a little more: bounds are rounded to dtype
    slack = 1e-3 if dtype == torch.float32 else 0.1
    assert (off <= step * (0.5 + slack)).all()


@each_way
def test_programs_give_what_a_plain_loop_over_the_dequantized_weights_gives(way: str) -> None:
    model = quantize_weights(_model(tie_word_embeddings=True), way)
    plain, compiled = _dequantized(model), compile(model, "eager", max_length=31, cache=False)
    (row,) = prompts(9)
    for program in (Program.identity(2), Program.parse("(0-1)*2@0.5 0", 2)):
        want = plain_logits(plain, program, row=row)
        assert (compiled.forward(row[None], program=program)[0] - want).abs().max() < 1e-4
        with compiled.session(program, 1) as session:
            first = compiled.prefill(program, session, [row[:-1]])[0]
            after = compiled.decode(program, session, row[-1:])[0]
        assert (torch.stack([first, after]) - want[-2:]).abs().max() < 1e-4
    _check_held_once(model, compiled, way=way)


def _check_held_once(model: PreTrainedModel, compiled: CompiledModel, *, way: str) -> None:
    """The compiled model reads the model's own integers, a tied table the head's."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, QuantizedLinear) and table.weight is head.integers  # type: ignore[union-attr]
    assert head.integers.dtype == torch.int8
    assert compiled.dtype == torch.float32
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in compiled.library.tensors.values()} <= own
    large = {p.dtype for p in model.parameters() if p.numel() > 1000}
    assert large == {torch.int8} | ({torch.uint8} if way == "int4" else set())


def test_an_untied_table_of_embeddings_stays_as_it_is() -> None:
    model = quantize_weights(_model(tie_word_embeddings=False), "int8")
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_the_library_is_found_again_without_tracing(tmp_path: Any) -> None:
    store = ArtifactStore(tmp_path)
    for traced in (True, False):
        model = quantize_weights(_model(), "int4")
        compiled = compile(model, "eager", max_length=31, cache=store)
        assert compiled.library.is_traced == traced


@pytest.mark.filterwarnings("ignore::polar_fx.errors.ModelWarning")
def test_experts_held_in_one_tensor_stay_as_they_are() -> None:
    model = make("mixtral")
    want = model(input_ids=prompts(5)[0][None]).logits
    with pytest.warns(ModelWarning, match="% of the weights in the layers of Mixtral"):
        quantize_weights(model, "int8")
    assert (model(input_ids=prompts(5)[0][None]).logits - want).abs().max() < 0.2 * want.abs().max()


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(InputError, match="unknown quantize 'int3'; use int8 or int4"):
        polar_fx.load(quantize="int3")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="quantize='int8' are for models that are named"):
        compile(_model(), "eager", quantize="int8")
    with pytest.raises(UnsupportedModelError, match="quantized already; leave quantize out"):
        quantize_weights(quantize_weights(_model(), "int8"), "int4")
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel have no torch.nn.Linear"):
        quantize_weights(make("gpt2"), "int8")


def test_a_named_model_is_loaded_quantized(tmp_path: Any) -> None:
    _model().save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = lambda *_, **__: None  # noqa: E731
        patch.setattr("polar_fx.models.AutoTokenizer.from_pretrained", tokenizer)
        model = named_or_loaded(tmp_path, None, device=None, quantize="int4")
    assert {type(m) for m in model.modules()} >= {QuantizedLinear}


def test_models_that_ask_weights_for_their_dtype_run() -> None:
    """Mamba hands the head hidden states in the dtype of its weight."""
    plain, ids = make("mamba").to(torch.bfloat16), torch.arange(3, 9)[None]
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
        got = quantize_weights(plain, "int8")(ids, use_cache=False).logits
    assert (got - want).abs().max() < 0.1 * want.abs().max()
