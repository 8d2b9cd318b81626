"""Fields that ask for nothing, defaults that a server follows or not, and text that stays."""

import copy
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from polar_fx.bundle import export
from polar_fx.bundle.settings import check_served
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError

pytest.importorskip("pydantic", reason="serving needs pip install 'polar_fx[serve]'")
pytest.importorskip("prometheus_client", reason="serving needs pip install 'polar_fx[serve]'")
from polar_fx.engine.stable_text import StableText
from polar_fx.serving.measures import Measures
from polar_fx.serving.requests import Chat, Completion, RequestError, Settings, read
from polar_fx.serving.service import Service
from polar_fx.serving.waiting import Waiting
from tiny_bundles import LENGTH, PROGRAMS, tokenizer_of_words
from tiny_models import make

BODIES: dict[type[Settings], dict[str, Any]] = {
    Completion: {"model": "tiny", "prompt": "w5"},
    Chat: {"model": "tiny", "messages": [{"role": "user", "content": "w5"}]},
}
NEUTRAL: dict[type[Settings], list[dict[str, Any]]] = {
    Completion: [{"suffix": ""}, {"echo": False}, {"best_of": 1}],
    Chat: [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"logprobs": False, "top_logprobs": 0},
        {"store": False, "metadata": {"for": "nobody"}, "service_tier": "auto"},
        {"safety_identifier": "one", "prompt_cache_key": "two"},
    ],
}
OTHERS: dict[type[Settings], list[tuple[str, Any]]] = {
    Completion: [("logprobs", 0), ("logprobs", 3), ("echo", True), ("suffix", "end")],
    Chat: [
        ("logprobs", True),
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("audio", {"voice": "low"}),
        ("reasoning_effort", "high"),
    ],
}
BOTH: list[dict[str, Any]] = [
    {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
    {"logit_bias": {"7": 0}, "stop": [], "stream_options": {}},
    {"stream_options": {"include_usage": None, "include_obfuscation": False}},
]


def asked(kind: type[Settings], **fields: Any) -> Settings:
    return read(kind, json.dumps({**BODIES[kind], **fields}).encode())


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_every_field_that_is_not_required_may_be_null(kind: type[Settings]) -> None:
    optional = {n for n, field in kind.model_fields.items() if not field.is_required()}
    assert optional == set(kind.model_fields) - set(BODIES[kind])
    plain = asked(kind)
    assert asked(kind, **dict.fromkeys(optional)) == plain
    for name in optional:
        assert getattr(asked(kind, **{name: None}), name) == getattr(plain, name)


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_values_that_ask_for_nothing_are_taken_and_others_refused(kind: type[Settings]) -> None:
    for fields in BOTH + NEUTRAL[kind]:
        assert asked(kind, **fields).temperature == 1
    for name, value in [*OTHERS[kind], ("logit_bias", {"7": 1}), ("frequency_penalty", 1)]:
        with pytest.raises(RequestError, match=f"^{name}") as refused:
            asked(kind, **{name: value})
        assert refused.value.param == name and refused.value.status == 400


def test_every_field_of_the_client_library_is_known_by_name() -> None:
    pytest.importorskip("openai", reason="the client library is not installed")
    from openai.types import completion_create_params as of_text
    from openai.types.chat import completion_create_params as of_chat

    for kind, params in ((Completion, of_text), (Chat, of_chat)):
        fields = params.CompletionCreateParamsBase.__annotations__
        assert set(fields) <= set(kind.model_fields), "serve a new field, or refuse it by name"


def test_an_answer_can_be_sent_back_as_it_was_received() -> None:
    turn = {
        "role": "assistant",
        "content": "w6",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    given = [*BODIES[Chat]["messages"], turn, {"role": "user", "content": "w7", "name": "ann"}]
    chat: Any = asked(Chat, messages=given)
    assert [m.text for m in chat.messages] == ["w5", "w6", "w7"]
    with pytest.raises(RequestError, match=r"messages\.1\.tool_calls"):
        asked(Chat, messages=[given[0], {**turn, "tool_calls": [{"id": "x"}]}])


# ------------------------------------------------------------------------------------ defaults


@pytest.fixture
def model() -> Any:
    """What a bundle is to an engine, without compiled code."""
    found: Any = compile(make("llama"), "eager", max_length=LENGTH, cache=False)
    found.generation_config = copy.deepcopy(found.generation_config)
    found.generation_config.eos_token_id = None
    found.programs = tuple(found.resolve(p) for p in PROGRAMS)
    found.tokenizer = tokenizer_of_words()
    return found


def texts(model: CompiledModel, **fields: Any) -> list[str]:
    service = Service(model, "tiny")  # type: ignore[arg-type]
    body: dict[str, Any] = {"prompt": [[3, 4], [5, 6, 7]], "max_tokens": 8, "temperature": 0}
    asks = service.read(asked(Completion, **{**body, **fields}))  # type: ignore[arg-type]
    running = [service.add(ask) for ask in asks]
    while service.engine.step():
        pass
    return [service.reply(request).text for request in running]


@pytest.mark.parametrize(
    "defaults", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_a_request_asks_for_one_answer_whatever_the_defaults(
    model: Any, defaults: dict[str, Any]
) -> None:
    want = texts(model)
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    assert texts(model) == want


def test_stop_texts_among_the_defaults_end_every_answer(model: Any) -> None:
    want = texts(model)
    stop = want[0].split()[3]
    model.generation_config.stop_strings = stop
    assert texts(model)[0] == want[0][: want[0].find(stop)]


UNSERVED: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 3,
    "max_time": 5.0,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize("name", UNSERVED)
def test_defaults_that_no_server_follows_are_refused_by_name(
    name: str, model: Any, tmp_path: Any
) -> None:
    check_served(None)
    check_served(GenerationConfig(num_beams=1, temperature=0.5, stop_strings=["x"]))
    config = GenerationConfig()
    setattr(config, name, UNSERVED[name])
    with pytest.raises(InputError, match=f"{name}=.*generation_config"):
        check_served(config)
    compiled = compile(make("llama"), "aot_inductor", max_length=LENGTH)
    compiled.generation_config = config
    with pytest.raises(InputError, match=f"{name}=.*generation_config"):
        export(compiled, tmp_path / "bundle", tokenizer=tokenizer_of_words())
    assert not (tmp_path / "bundle").exists()


def test_an_engine_refuses_defaults_by_which_nothing_can_run(model: Any) -> None:
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(InputError, match="prompt_lookup_num_tokens=3"):
        Service(model, "tiny")


# ---------------------------------------------------------------------------------- stable text


def words(*pieces: str, **options: Any) -> Any:
    tokenizer = Tokenizer(WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_pieces() -> Any:
    pieces = ["a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PIECES = ("a", "b", "'", ".", ",", "?", "n't", "'s", "'re", "'m")


@pytest.mark.parametrize("kind", ["spaces taken out", "plain words", "bytes"])
def test_what_is_told_stays_whatever_follows(kind: str) -> None:
    """Random texts of pieces that are joined to what stands before them."""
    tokenizer = {
        "spaces taken out": lambda: words(*PIECES, clean_up_tokenization_spaces=True),
        "plain words": lambda: words(*PIECES),
        "bytes": byte_pieces,
    }[kind]()
    text, generator = StableText(tokenizer), torch.Generator().manual_seed(0)
    chosen = [0, 1, 12, 0xE4 + 2, 0xBD + 2, 0xA0 + 2] if kind == "bytes" else range(len(PIECES))
    told = changed = 0
    for _ in range(200):
        picks = torch.randint(0, len(chosen), (12,), generator=generator).tolist()
        ids = [chosen[p] for p in picks]
        whole = text.whole(ids)
        for end in range(1, len(ids) + 1):
            known, shown = text.known(ids[:end]), text.whole(ids[:end])
            assert whole.startswith(known), (ids, end)
            told, changed = told + len(known), changed + (not whole.startswith(shown))
    assert told and bool(changed) == (kind != "plain words"), "else this tests nothing"


# ------------------------------------------------------------------------------- waiting prompts


def test_requests_beyond_what_may_wait_are_told_to_come_later() -> None:
    waiting = Waiting(4, Measures())
    with waiting.holding(3):
        waiting.check_room()
        with waiting.holding(2):
            with pytest.raises(RequestError, match="5 prompts wait or run already") as refused:
                waiting.check_room()
            assert refused.value.status == 503
        waiting.check_room()
    assert waiting.prompts == 0
