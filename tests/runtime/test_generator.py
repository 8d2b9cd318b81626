"""generate: transformers' own loop on top of programs.

Identity must be indistinguishable from the model.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, KvOverflowError
from polar_fx.runtime.generator import _Running
from polar_fx.runtime.runner import Runner
from tiny_models import make, prompts

PROGRAM = "0 (1-2)*2 3"


@functools.cache
def _model() -> Any:
    return make("llama")


@functools.cache
def _compiled() -> CompiledModel:
    return compile(_model(), "eager", max_length=63)


def _plain_greedy(ids: Tensor, program: str, *, new: int) -> list[int]:
    """Greedy decoding by whole forward passes: no KV, no generation utilities."""
    row = ids.tolist()
    for _ in range(new):
        row.append(int(_compiled().forward(torch.tensor([row]), program=program)[0, -1].argmax()))
    return row


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "top k": {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams, several returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "no repeated pairs": {"do_sample": False, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_identity_generates_what_the_model_generates(options: dict[str, Any]) -> None:
    ids = prompts(9)[0][None]
    torch.manual_seed(0)
    want = _model().generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0, **options)
    torch.manual_seed(0)
    got = _compiled().generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0, **options)
    assert got.tolist() == want.tolist()


def test_a_program_generates_what_repeated_forward_passes_generate() -> None:
    ids = prompts(9)[0]
    got = _compiled().generate(
        ids[None], program=PROGRAM, max_new_tokens=12, eos_token_id=None, do_sample=False
    )
    assert got[0].tolist() == _plain_greedy(ids, PROGRAM, new=12)
    assert got[0].tolist() != _plain_greedy(ids, "identity", new=12), (
        "a program that changes nothing tests nothing"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_generate_what_each_generates_alone(side: str) -> None:
    rows = prompts(9, 4)
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    got = _compiled().generate(
        ids,
        attention_mask=mask,
        program=PROGRAM,
        max_new_tokens=10,
        eos_token_id=None,
        do_sample=False,
    )
    for row, out in zip(rows, got, strict=True):
        assert out[9:].tolist() == _plain_greedy(row, PROGRAM, new=10)[len(row) :]


def test_generation_stops_at_a_stop_token() -> None:
    ids = prompts(9)[0]
    full = _plain_greedy(ids, PROGRAM, new=12)[9:]
    got = _compiled().generate(
        ids[None],
        program=PROGRAM,
        max_new_tokens=12,
        eos_token_id=full[4],
        do_sample=False,
        pad_token_id=0,
    )
    assert got[0, 9:].tolist() == full[: full.index(full[4]) + 1]


def test_rows_that_stop_early_are_padded_while_others_go_on() -> None:
    rows = torch.stack(prompts(9, 9))
    free = [_plain_greedy(r, PROGRAM, new=12)[9:] for r in rows]
    stop = next(t for t in free[0] if t not in free[1])
    at = free[0].index(stop)
    got = _compiled().generate(
        rows, program=PROGRAM, max_new_tokens=12, eos_token_id=stop, do_sample=False, pad_token_id=0
    )
    assert got[0, 9:].tolist() == free[0][: at + 1] + [0] * (11 - at)
    assert got[1, 9:].tolist() == free[1]


class _Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_stream_in_order() -> None:
    ids, streamer = prompts(9)[0], _Collect()
    _compiled().generate(
        ids[None],
        program=PROGRAM,
        max_new_tokens=6,
        eos_token_id=None,
        do_sample=False,
        streamer=streamer,
    )
    assert streamer.ended and streamer.seen == _plain_greedy(ids, PROGRAM, new=6)


def test_a_generation_config_and_a_full_output_work() -> None:
    config = GenerationConfig(
        max_new_tokens=5,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    out = _compiled().generate(prompts(9)[0][None], program=PROGRAM, generation_config=config)
    assert (
        out.sequences.shape == (1, 14) and len(out.scores) == 5 and out.scores[0].shape == (1, 100)
    )


def test_a_prompt_may_fill_the_pool_to_the_last_token() -> None:
    ids = torch.full((1, 60), 5)
    assert _compiled().generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None
    ).shape == (1, 64)
    with pytest.raises(
        KvOverflowError, match=r"max_new_tokens=5 exceed the KV pool of 63.*max_length=65"
    ):
        _compiled().generate(ids, max_new_tokens=5, do_sample=False)


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="assistant_model"):
        _compiled().generate(prompts(9)[0][None], assistant_model=_model(), max_new_tokens=2)


REFUSED: dict[str, dict[str, Any]] = {
    "cache_implementation='quantized'": dict(cache_implementation="quantized"),
    "cache_implementation='offloaded'": dict(cache_implementation="offloaded"),
    "output_hidden_states=True": dict(output_hidden_states=True, return_dict_in_generate=True),
    "output_attentions=True": dict(output_attentions=True, return_dict_in_generate=True),
    "prompt_lookup_num_tokens=2": dict(prompt_lookup_num_tokens=2),
    "assistant_early_exit=1": dict(assistant_early_exit=1),
    "dola_layers='low'": dict(dola_layers="low"),
    "penalty_alpha=0.6": dict(penalty_alpha=0.6, top_k=4),
    "force_words_ids=": dict(force_words_ids=[[5]], num_beams=2),
}


@pytest.mark.parametrize("place", ["argument", "configuration", "the model's own"])
@pytest.mark.parametrize("named", REFUSED)
def test_settings_that_only_the_model_can_follow_are_refused_wherever_they_stand(
    named: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, compiled = REFUSED[named], _compiled()
    given: dict[str, Any] = {}
    if place == "argument":
        given = settings
    elif place == "configuration":
        given = {"generation_config": GenerationConfig(**settings)}
    else:
        for name, value in settings.items():
            monkeypatch.setattr(compiled.generation_config, name, value)
    monkeypatch.setattr(Runner, "prefill", None)  # nothing may run
    ids = prompts(9)[0][None]
    with pytest.raises(InputError, match=named.partition("=")[0] if "cache" in named else named):
        compiled.generate(ids, max_new_tokens=2, do_sample=False, **given)


def test_settings_without_effect_are_no_reason_to_refuse() -> None:
    ids = prompts(9)[0][None]
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
    want = _compiled().generate(ids, **options)
    without_effect: list[dict[str, Any]] = [
        {"guidance_scale": 1.0},
        {"output_attentions": True},
        {"use_cache": False},
        {"num_beam_groups": 1},
        {"cache_implementation": "static"},
        {"generation_config": GenerationConfig(cache_implementation="dynamic")},
    ]
    for extra in without_effect:
        assert torch.equal(_compiled().generate(ids, **options, **extra), want)


def test_the_models_configuration_is_left_alone() -> None:
    before = _model().generation_config.to_dict()
    _compiled().generate(prompts(9)[0][None], max_new_tokens=2, do_sample=True, temperature=0.3)
    assert _model().generation_config.to_dict() == before


@pytest.mark.parametrize("size", [1, 4, 9, 20])
def test_a_prompt_that_transformers_would_cut_up_is_read_as_a_whole(size: int) -> None:
    rows = torch.stack(prompts(11, 11))
    options: dict[str, Any] = dict(
        max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    want = _model().generate(rows, **options)
    assert torch.equal(_compiled().generate(rows, prefill_chunk_size=size, **options), want)
    config = GenerationConfig(prefill_chunk_size=size, **options)
    assert torch.equal(_compiled().generate(rows, generation_config=config), want)
    assert config.prefill_chunk_size == size
    mask = torch.ones_like(rows)
    mask[1, :6] = 0
    padded = _compiled().generate(rows, attention_mask=mask, prefill_chunk_size=size, **options)
    assert torch.equal(padded, _compiled().generate(rows, attention_mask=mask, **options))


def test_a_loop_may_append_any_number_of_tokens_at_once() -> None:
    rows = torch.stack(prompts(12, 12))
    want = _compiled().forward(rows, program=PROGRAM)
    with _compiled().session(_compiled().resolve(PROGRAM), 2) as session:
        loop: Any = _Running(_compiled().runner, _compiled().generation_config)
        ones = torch.ones_like(rows)
        for end in (4, 7):  # all tokens so far, as a loop of its own may pass them
            got = loop(rows[:, :end], ones[:, :end], session).logits
            torch.testing.assert_close(got[:, -1], want[:, end - 1])
        torch.testing.assert_close(got, want[:, 4:7])
        # the new ones alone
        torch.testing.assert_close(loop(rows[:, 7:11], ones[:, :11], session).logits, want[:, 7:11])
        torch.testing.assert_close(loop(rows, ones, session).logits[:, 0], want[:, 11])


def test_padding_among_tokens_that_follow_is_refused() -> None:
    rows = torch.stack(prompts(9, 9))
    mask = torch.ones_like(rows)
    mask[0, 7] = 0
    with _compiled().session(_compiled().resolve(PROGRAM), 2) as session:
        loop: Any = _Running(_compiled().runner, _compiled().generation_config)
        loop(rows[:, :4], mask[:, :4], session)
        with pytest.raises(
            InputError, match="5 tokens a row follow the prompt at once, some of them padding"
        ):
            loop(rows, mask, session)


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled_smollm2(
    smollm2: tuple[PreTrainedModel, Any], request: pytest.FixtureRequest
) -> CompiledModel:
    return compile(smollm2[0], request.param, max_length=127)


@pytest.mark.slow
def test_smollm2_greedy_text_is_the_models_for_fifty_tokens(
    smollm2: tuple[Any, Any], compiled_smollm2: CompiledModel
) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(
        "The three most important facts about the moon are", return_tensors="pt"
    ).input_ids
    want = model.generate(ids, max_new_tokens=50, do_sample=False)
    got = compiled_smollm2.generate(ids, max_new_tokens=50, do_sample=False)
    assert tokenizer.decode(got[0]) == tokenizer.decode(want[0])
    skipped = compiled_smollm2.generate(ids, program="skip 5", max_new_tokens=50, do_sample=False)
    assert skipped.tolist() != want.tolist()


def test_smollm2_stops_at_a_string(
    smollm2: tuple[Any, Any], compiled_smollm2: CompiledModel
) -> None:
    tokenizer = smollm2[1]
    ids = tokenizer("One, two, three, four,", return_tensors="pt").input_ids
    out = compiled_smollm2.generate(
        ids, max_new_tokens=30, do_sample=False, stop_strings=" seven", tokenizer=tokenizer
    )
    assert tokenizer.decode(out[0, ids.shape[1] :]) == " five, six, seven"


def test_smollm2_answers_padded_chats_as_each_alone(
    smollm2: tuple[Any, Any], compiled_smollm2: CompiledModel
) -> None:
    tokenizer = smollm2[1]
    texts = ["The capital of France is", "The opposite of hot is"]
    encoded = tokenizer(
        [t + " " for t in texts[:1]] + texts[1:],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    both = compiled_smollm2.generate(**encoded, max_new_tokens=5, do_sample=False)
    for row, mask, out in zip(encoded.input_ids, encoded.attention_mask, both, strict=True):
        alone = compiled_smollm2.generate(row[mask.bool()][None], max_new_tokens=5, do_sample=False)
        assert out[-5:].tolist() == alone[0, -5:].tolist()
