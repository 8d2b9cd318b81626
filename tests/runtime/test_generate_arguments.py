"""Every argument of transformers' generate and every generation setting is served or refused."""

import functools
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
)

from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, KvOverflowError, ModelWarning
from tiny_models import make, prompts

COMMON: dict[str, Any] = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0)
# each with what it is tried with, beside COMMON; the answer has to be the model's own
SERVED: dict[str, dict[str, Any]] = {
    "bad_words_ids": dict(bad_words_ids=[[5], [7, 8]]),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(3, 60))),
    "bos_token_id": dict(bos_token_id=3),
    "diversity_penalty": dict(diversity_penalty=0.0),
    "do_sample": dict(do_sample=True),
    "early_stopping": dict(num_beams=2, early_stopping=True),
    "encoder_no_repeat_ngram_size": dict(encoder_no_repeat_ngram_size=2),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=1.5),
    "eos_token_id": dict(eos_token_id=[7, 11]),
    "epsilon_cutoff": dict(do_sample=True, epsilon_cutoff=0.01),
    "eta_cutoff": dict(do_sample=True, eta_cutoff=0.01),
    "exponential_decay_length_penalty": dict(
        eos_token_id=7, exponential_decay_length_penalty=(2, 1.5)
    ),
    "forced_bos_token_id": dict(forced_bos_token_id=9),
    "forced_eos_token_id": dict(forced_eos_token_id=9),
    "guidance_scale": dict(guidance_scale=1.5),
    "negative_prompt_ids": dict(
        guidance_scale=2.0, negative_prompt_ids=torch.tensor([[5, 9, 11, 7]])
    ),
    "negative_prompt_attention_mask": dict(
        guidance_scale=0.5,
        negative_prompt_ids=torch.tensor([[5, 9, 11, 7]]),
        negative_prompt_attention_mask=torch.tensor([[0, 1, 1, 1]]),
    ),
    "length_penalty": dict(num_beams=2, length_penalty=2.0),
    "max_length": dict(max_new_tokens=None, max_length=14),
    "max_new_tokens": dict(max_new_tokens=3),
    "max_time": dict(max_time=600.0),
    "min_length": dict(eos_token_id=list(range(50)), min_length=14),
    "min_new_tokens": dict(eos_token_id=list(range(50)), min_new_tokens=4),
    "min_p": dict(do_sample=True, min_p=0.1),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "num_beams": dict(num_beams=3),
    "num_return_sequences": dict(num_beams=3, num_return_sequences=2),
    "pad_token_id": dict(eos_token_id=list(range(50)), pad_token_id=1),
    "prefill_chunk_size": dict(prefill_chunk_size=4),
    "remove_invalid_values": dict(remove_invalid_values=True),
    "renormalize_logits": dict(num_beams=2, renormalize_logits=True),
    "repetition_penalty": dict(repetition_penalty=1.5),
    "sequence_bias": dict(sequence_bias=[[[5], 4.0]]),
    "suppress_tokens": dict(suppress_tokens=list(range(3, 60))),
    "temperature": dict(do_sample=True, temperature=0.5),
    "top_k": dict(do_sample=True, top_k=3),
    "top_p": dict(do_sample=True, top_p=0.5),
    "typical_p": dict(do_sample=True, typical_p=0.5),
    "use_cache": dict(use_cache=True),
    "cache_implementation": dict(cache_implementation="dynamic"),
    "logits_processor": dict(logits_processor=[]),
    "stopping_criteria": dict(stopping_criteria=[]),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=lambda row, ids: [5, 6, 7]),
    "generation_config": dict(generation_config=GenerationConfig(repetition_penalty=1.3)),
    "top_h": dict(do_sample=True, top_h=0.5),
    "watermarking_config": dict(watermarking_config={"bias": 2.0}),
    "low_memory": dict(low_memory=True),
    # of no effect here, as in the model itself without an assistant or a static cache
    "max_cache_len": dict(max_cache_len=20),
    "cache_config": dict(cache_config={}),
    "compile_config": dict(compile_config=CompileConfig()),
    "disable_compile": dict(disable_compile=True),
    "decoder_start_token_id": dict(decoder_start_token_id=5),
    "num_assistant_tokens": dict(num_assistant_tokens=3),
    "num_assistant_tokens_schedule": dict(num_assistant_tokens_schedule="constant"),
    "assistant_confidence_threshold": dict(assistant_confidence_threshold=0.5),
    "assistant_lookbehind": dict(assistant_lookbehind=3),
    "target_lookbehind": dict(target_lookbehind=3),
    "max_matching_ngram_size": dict(max_matching_ngram_size=3),
}
REFUSED: dict[str, Any] = {
    "assistant_early_exit": 1,
    "assistant_model": "another",
    "constraints": ["one"],
    "custom_generate": "folder",
    "dola_layers": "low",
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "token_healing": True,
    "cache": "another",
    "past_key_values": "another",
    "inputs_embeds": torch.ones(1, 2, 32),
    "position_ids": torch.ones(1, 2),
    "use_mtp": True,
    "num_beam_groups": 2,
    "is_assistant": True,
    "synced_gpus": True,
}
ELSEWHERE = {  # what other tests are about, and what names no setting of a call
    *("self", "inputs", "kwargs", "streamer", "stop_strings", "return_dict_in_generate"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("transformers_version", "_from_model_config", "continuous_batching_config"),
    *("speculation_type", "assistant_ensemble_weight"),
}


@functools.cache
def model() -> Any:
    return make("llama")


@functools.cache
def compiled() -> CompiledModel:
    return compile(model(), "eager", max_length=63, cache=False)


def test_every_argument_and_setting_is_on_one_list() -> None:
    mixin: Any = GenerationMixin  # wrapped, so that no type is left
    arguments = set(inspect.signature(mixin.generate).parameters)
    found = arguments | set(GenerationConfig().to_dict())
    known = {*SERVED, *REFUSED, *ELSEWHERE}
    assert not found - known, "serve what is new, or refuse it by name, and list it here"
    assert len(known) == len(SERVED) + len(REFUSED) + len(ELSEWHERE), "on one list alone"


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_gives_the_answer_of_the_model(name: str) -> None:
    ids, options = prompts(9)[0][None], {"do_sample": False, **COMMON, **SERVED[name]}
    torch.manual_seed(0)
    want = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    torch.manual_seed(0)
    assert torch.equal(compiled().generate(ids, **options), want)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name(name: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, name: REFUSED[name]}
    if name in ("constraints", "force_words_ids", "num_beam_groups"):
        options["num_beams"] = 2
    if name == "penalty_alpha":
        options["top_k"] = 4
    with pytest.raises(InputError, match=name):
        compiled().generate(prompts(9)[0][None], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_beams=0), "num_beams=0"),
        (dict(num_return_sequences=0, do_sample=True), "num_return_sequences=0"),
        (dict(generation_config={"num_beams": 2}), "must be a transformers GenerationConfig"),
        (dict(attention_mask=torch.full((1, 9), 0.5)), "holds 0.5; it is 1 at real tokens"),
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        compiled().generate(prompts(9)[0][None], **options)


# ---------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("negative", [False, True])
def test_rows_are_guided_as_each_alone(copies: int, negative: bool) -> None:
    """Several rows, several programs, several samples: the unguided rows go with theirs."""
    ids, _ = padded("left")
    options: dict[str, Any] = dict(guidance_scale=1.5, num_return_sequences=copies, top_k=1)
    options |= {**COMMON, "do_sample": copies > 1}
    others = torch.stack(prompts(3, 3, 3)) if negative else None
    programs = ["identity", "0 1 1 2 3", "identity"]
    for program in ("0 2 3", programs):
        got = compiled().generate(ids, program=program, negative_prompt_ids=others, **options)
        for i, row in enumerate(ids):
            own = program if isinstance(program, str) else program[i]
            other = None if others is None else others[i : i + 1]
            want = compiled().generate(row[None], program=own, negative_prompt_ids=other, **options)
            assert torch.equal(got[copies * i : copies * (i + 1)], want)
    if not negative:  # padding is no prompt
        ids = ids.clone()
        ids[1] = ids[1].roll(-5)
        own = compiled().generate(ids[1:2, :4], **options)[:, 4:]
        assert torch.equal(compiled().generate(ids, **options)[copies : 2 * copies, 9:], own)
    plain = {**options, "guidance_scale": None}
    assert not torch.equal(compiled().generate(ids, **plain), compiled().generate(ids, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(guidance_scale=1.5, num_beams=2), "guidance_scale=1.5 with num_beams=2"),
        (dict(negative_prompt_ids=torch.ones(1, 2, dtype=torch.long)), "pass guidance_scale"),
        (dict(guidance_scale=1.5, negative_prompt_ids=torch.full((1, 2), 100)), "holds token id"),
        (dict(guidance_scale=1.5, negative_prompt_ids=torch.ones(2, 2).long()), "2 rows beside 1"),
        (dict(guidance_scale=1.5, negative_prompt_attention_mask=torch.ones(1, 2)), "pass both"),
        (dict(guidance_scale=1.5, negative_prompt_ids=torch.ones(1, 62).long()), "of 62 tokens"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((InputError, KvOverflowError), match=words):
        compiled().generate(prompts(9)[0][None], **COMMON, do_sample=False, **options)


# ------------------------------------------------------------------ prompts without attention_mask


def padded(side: str) -> tuple[Tensor, list[Tensor]]:
    rows, ids = prompts(9, 4, 6), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, slice(9 - len(row), 9) if side == "left" else slice(0, len(row))] = row
    return ids, rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_found_by_the_pad_token(side: str) -> None:
    ids, rows = padded(side)
    options: dict[str, Any] = {**COMMON, "do_sample": False}
    found = compiled().generate(ids, **options)
    for row, got in zip(rows, found, strict=True):
        assert got[9:].tolist() == compiled().generate(row[None], **options)[0, len(row) :].tolist()
    assert torch.equal(found, compiled().generate(ids, attention_mask=(ids != 0).long(), **options))
    if side == "left":
        assert torch.equal(found, model().generate(ids, **options))


def test_a_prompt_of_pad_tokens_alone_is_a_prompt() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    options: dict[str, Any] = {**COMMON, "do_sample": False}
    want = compiled().generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(compiled().generate(ids, **options), want)


def test_padding_that_may_be_text_is_taken_for_text_with_a_warning() -> None:
    ids, _ = padded("left")
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, eos_token_id=0)
    want = compiled().generate(ids, attention_mask=torch.ones_like(ids), **options)
    for pad in (0, None):
        with pytest.warns(ModelWarning, match="token 0, which both pads and ends a text"):
            assert torch.equal(compiled().generate(ids, pad_token_id=pad, **options), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled().generate(ids, attention_mask=(ids != 0).long(), pad_token_id=0, **options)
