"""A frozen text encoder: its states are what transformers gives, whatever the batch; what cannot be
one is refused.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from polar_fx.errors import InputError, ModelNotFoundError
from polar_fx.evaluation.polar.text_encoder import TextEncoder
from polar_fx.predictor.features import Features
from tiny_search import save_tiny_encoder

TEXTS = ["ab", "7", "q3x9 hello", "zzzzz"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.load(save_tiny_encoder(tmp_path_factory.mktemp("encoder")))


def test_states_are_those_of_the_model_alone(encoder: TextEncoder) -> None:
    found = encoder.states(TEXTS)
    for text, states in zip(TEXTS, found, strict=True):
        ids = encoder.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            alone = encoder.model(ids).last_hidden_state[0]
        assert states.dtype == torch.float32 and states.shape == (len(text), encoder.size) == (
            len(text),
            16,
        )
        assert torch.allclose(states, alone, atol=1e-5)
    assert torch.equal(
        Features(0, 99).pooled(found[0]), torch.cat([found[0][-1], found[0].mean(0)])
    )
    assert (
        not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    )


def test_of_a_long_text_the_end_is_read(encoder: TextEncoder) -> None:
    long, end = encoder.states(["abcdefghijklmnopqrst", "ijklmnopqrst"])
    assert encoder.max_tokens == len(long) == 12 and torch.allclose(long, end, atol=1e-5)


def test_the_fingerprint_tells_weights_and_vocabulary(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    first, again = TextEncoder.load(tmp_path), TextEncoder.load(tmp_path)
    assert first.fingerprint == again.fingerprint and len(first.fingerprint) == 64
    changed = TextEncoder.load(tmp_path)
    with torch.no_grad():
        next(changed.model.parameters())[0, 0] += 1
    more = TextEncoder.load(tmp_path)
    more.tokenizer.add_tokens(["new"])
    assert len({first.fingerprint, changed.fingerprint, more.fingerprint}) == 3


def test_of_a_model_with_a_decoder_the_encoder_is_used(encoder: TextEncoder) -> None:
    from transformers import T5Config, T5Model

    sizes: dict[str, Any] = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    whole = T5Model(T5Config(vocab_size=len(encoder.tokenizer), **sizes))
    (states,) = TextEncoder(whole, encoder.tokenizer).states(["abc"])
    with torch.no_grad():
        expected = whole.encoder(
            encoder.tokenizer("abc", return_tensors="pt").input_ids
        ).last_hidden_state[0]
    assert torch.allclose(states, expected, atol=1e-5)


def test_refusals(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text '' has no tokens"):
        encoder.states(["ab", ""])
    with pytest.raises(InputError, match="no padding token; set tokenizer.pad_token"):
        TextEncoder.load(save_tiny_encoder(tmp_path, pad_token=None))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="only pickled weights"):
        TextEncoder.load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="has as a text encoder"):
        TextEncoder.load("/no/such/folder")
