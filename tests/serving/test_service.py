"""Requests read and answered over a bundle, without a server."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from polar_fx.compiled import CompiledModel, compile
from polar_fx.engine import Generated
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.policy import Calibration
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program

pytest.importorskip("pydantic", reason="serving needs pip install 'polar_fx[serve]'")
pytest.importorskip("prometheus_client", reason="serving needs pip install 'polar_fx[serve]'")
from polar_fx.serving.answers import CHAT, COMPLETION, Reply
from polar_fx.serving.requests import MAX_BODY_BYTES, Chat, Completion, RequestError, read
from polar_fx.serving.service import Ask, Service
from served_bundles import TEMPLATE, alone
from tiny_bundles import LENGTH, PROGRAMS, tokenizer_of_words
from tiny_models import make


@pytest.fixture(scope="module")
def captured() -> CompiledModel:
    """What a bundle is to an service, without compiled code."""
    return compile(make("llama"), "eager", max_length=LENGTH)


@pytest.fixture
def service(captured: CompiledModel) -> Service:
    model: Any = captured
    model.dispatcher = None
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.programs = tuple(model.resolve(p) for p in PROGRAMS)
    model.tokenizer = tokenizer_of_words()
    model.tokenizer.chat_template = TEMPLATE
    return Service(model, "tiny")


def asks(service: Service, **fields: Any) -> list[Ask]:
    given = {"model": "tiny", "prompt": "w5 w6 w7", "temperature": 0, **fields}
    return service.read(read(Completion, json.dumps(given).encode()))


def answers(service: Service, *given: Ask) -> list[Reply]:
    found = service.answer(given)
    assert all(isinstance(a, Reply) for a in found), found
    return found  # type: ignore[return-value]


def test_prompts_of_all_programs_run_together(service: Service) -> None:
    given, wanted = [], []
    for i in range(12):
        prompt, program, tokens = list(range(3, 5 + i)), PROGRAMS[i % 3], 2 + i % 4
        given += asks(service, prompt=prompt, program=program, max_tokens=tokens)
        wanted.append(alone(service, prompt, program=program, tokens=tokens))
    found = answers(service, *given)
    assert [a.text for a in found] == wanted, "each row stops at its own limit"
    for i, each in enumerate(found):
        assert (each.prompt_tokens, each.new_tokens) == (2 + i, 2 + i % 4)
        assert (each.reason, each.rows) == ("length", 12)
    assert len({a.program for a in found}) == 3
    assert [a.steps for a in found[:3]] == [4, 3, 6]
    assert all(0 < r.seconds_to_first <= r.seconds for r in _results(service, given[:2]))


def _results(service: Service, given: list[Ask]) -> list[Generated]:
    running = [service.add(ask) for ask in given]
    while service.engine.step():
        pass
    return [request.result(0) for request in running]


def test_a_long_row_and_sampled_ones_run_beside_others(service: Service) -> None:
    one, two = asks(service, prompt=[5] * 50, max_tokens=14) + asks(
        service, prompt=[5, 6], max_tokens=60
    )
    assert [a.rows for a in answers(service, one, two)] == [2, 2]
    sampled = [
        *asks(service),
        *asks(service, temperature=1.0),
        *asks(service, temperature=0.5),
    ]
    assert [a.rows for a in answers(service, *sampled)] == [3, 3, 3]
    seeded = [asks(service, temperature=1.0, seed=3, max_tokens=12)[0] for _ in range(2)]
    first, second = answers(service, *seeded)
    assert first.text == second.text == answers(service, seeded[0])[0].text
    free = [asks(service, temperature=1.0, max_tokens=12)[0] for _ in range(4)]
    assert len({a.text for a in answers(service, *free)}) > 1


def test_generation_defaults_hold_beside_what_a_request_says(service: Service) -> None:
    text = alone(service, [5, 6, 7], program="identity", tokens=12)
    first = int(text.split()[0][1:])
    service.bundle.generation_config.suppress_tokens = [first]
    service.bundle.generation_config.repetition_penalty = 1.3
    wanted = alone(service, [5, 6, 7], program="identity", tokens=12)
    (found,) = answers(service, *asks(service, max_tokens=12))
    assert found.text == wanted != text


def test_an_answer_ends_at_a_stop_text_an_end_token_or_when_nobody_waits(service: Service) -> None:
    text = alone(service, [5, 6, 7], program="identity", tokens=12)
    stop = text.split()[3]
    (whole,) = answers(service, *asks(service, max_tokens=12))
    (cut,) = answers(service, *asks(service, max_tokens=12, stop=["nothing", stop]))
    assert (
        whole.text == text
        and cut.text == text[: text.find(stop)]
        and (cut.reason, whole.reason) == ("stop", "length")
    )
    assert cut.new_tokens == len(text[: text.find(stop)].split()) + 1
    left = service.add(asks(service, max_tokens=12)[0])
    service.engine.step()
    left.cancel()
    service.engine.step()
    assert 0 < service.reply(left).new_tokens < 12
    service.bundle.generation_config.eos_token_id = [int(stop[1:]), 99]
    found = answers(
        service,
        *asks(service, max_tokens=12),
        *asks(service, prompt=[9] * 5, max_tokens=3, stop="zz"),
    )
    assert found[0].text == cut.text.strip() and found[0].reason == "stop" and found[0].rows == 2


def test_text_is_told_as_far_as_it_is_certain(service: Service) -> None:
    text = alone(service, [5, 6, 7], program="identity", tokens=12)
    stop = " ".join(text.split()[6:8])
    told: dict[str, list[str]] = {"plain": [], "stopped": []}

    def hear(name: str) -> Any:
        return lambda request: told[name].append(service.known_text(request))

    (ask, until) = asks(service, max_tokens=12) + asks(service, max_tokens=12, stop=stop)
    plain, stopped = service.add(ask, hear("plain")), service.add(until, hear("stopped"))
    while service.engine.step():
        pass
    whole, cut = service.reply(plain), service.reply(stopped)
    assert (
        whole.text == text
        and told["plain"] == [text[: len(t)] for t in told["plain"]]
        and len(set(told["plain"])) > 6
    )
    assert cut.text == text[: text.find(stop)] and told["stopped"]
    assert all(cut.text.startswith(t) for t in told["stopped"]), "nothing of a stop text is told"


def test_a_dispatcher_chooses_where_no_program_is_named(service: Service) -> None:
    model = service.bundle
    menu = Menu.of([Program.parse(text, 4) for text in ("skip 2", "repeat 3")])
    network = SelectorNetwork(2 * model.config.hidden_size, len(menu), width=4)
    model.dispatch_by(
        Selector(menu, Features(1, 8), network=network, calibration=Calibration(0.0, {0.9: 0.1})),
        policy="mean_steps<=0.9",
    ).admit()
    service = Service(model, "tiny")
    prompts = [[5, 6, 7], [9, 9, 9, 9, 9], [11]]
    chosen = [
        service.bundle.dispatch(torch.tensor([p]), max_new_tokens=3)[1].decisions[0]
        for p in prompts
    ]
    found = answers(
        service,
        *asks(service, prompt=prompts, max_tokens=3),
        *asks(service, program="skip 2", max_tokens=3),
    )
    for each, decision in zip(found[:3], chosen, strict=True):
        assert each.program == str(decision.program)
        assert each.probability == pytest.approx(decision.probability, abs=1e-5)
    assert found[3].probability is None
    assert max(a.rows for a in found) > 1, "chosen and named ones run together"


def test_a_prompt_that_fails_fails_alone(service: Service) -> None:
    def fails(tokens: Any, scores: Any) -> Any:
        raise RuntimeError("out of something")

    (asked,) = asks(service, program="skip 1")
    broken = replace(asked, sampling=replace(asked.sampling, processors=(fails,)))
    bad, good = service.answer([broken, *asks(service)])
    assert (
        isinstance(bad, RequestError)
        and bad.status == 500
        and bad.body()["error"]["type"] == "server_error"
    )
    assert isinstance(good, Reply) and good.new_tokens == 16


def test_what_the_engine_cannot_take_is_told_in_the_apis_words(service: Service) -> None:
    small = Service(service.bundle, "tiny", max_waiting=1)
    (ask,) = asks(small)
    small.add(ask)
    with pytest.raises(RequestError, match="1 requests wait already") as refused:
        small.add(ask)
    assert refused.value.status == 503
    small.engine.close()
    with pytest.raises(RequestError, match="closed") as refused:
        small.add(ask)
    assert refused.value.status == 500 and not small.engine.is_open


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": [1, 100]}, "prompt", r"outside 0\.\.99"),
        (
            {"prompt": [5] * 60, "max_tokens": 5},
            "prompt",
            f"prompt of 60 tokens and max_tokens=5 exceed the {LENGTH} tokens",
        ),
        ({"prompt": {"a": 1}}, "prompt.", "Input should be"),
        (
            {"program": "skip 9"},
            "program",
            r"'skip 9' is not served; use one of '0-3 /4', '0 2-3 /4', ",
        ),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"n": 2}, "n", "less than or equal to 1, got 2"),
        ({"stream": True, "prompt": ["w5", "w6"]}, "stream", "stream is for one prompt"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"presence_penalty": 0.5}, "presence_penalty", "got 0.5"),
        ({"functions": []}, "functions", "is not served; leave it out. Known are best_of, "),
    ],
)
def test_requests_that_are_refused(
    service: Service, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        asks(service, **fields)
    error = refused.value.body()["error"]
    assert (
        error["type"] == "invalid_request_error"
        and error["message"] == str(refused.value)
        and refused.value.status == 400
    )
    assert error["param"].startswith(param)


def test_bodies_that_are_no_requests_and_other_models(service: Service) -> None:
    for body, message, status in (
        (b"{", "the body: Invalid JSON", 400),
        (b"[]", "the body: .*, got ", 400),
        (b'{"model": "tiny"}', "prompt: Field required", 400),
        (b" " * (MAX_BODY_BYTES + 1), "the body has 4.2 MB; send at most 4.2 MB", 413),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            read(Completion, body)
        assert refused.value.status == status
    with pytest.raises(
        RequestError, match="model 'other' is not served here; use 'tiny'"
    ) as refused:
        asks(service, model="other")
    assert refused.value.status == 404 and refused.value.code == "model_not_found"


def said(service: Service, *messages: Any, **fields: Any) -> list[Ask]:
    return service.read(
        read(Chat, json.dumps({"model": "tiny", "messages": messages, **fields}).encode())
    )


def test_chats_go_through_the_template(service: Service) -> None:
    parts = [{"type": "text", "text": "w7"}]
    (ask,) = said(
        service, {"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": parts}
    )
    assert ask.ids == [5, 6, 7] and ask.sampling.max_new_tokens == LENGTH - 2, "all that fits"
    assert (
        said(service, {"role": "user", "content": "w5"}, max_completion_tokens=4)[
            0
        ].sampling.max_new_tokens
        == 4
    )
    for messages, message in (
        (
            [{"role": "system", "content": "w5"}],
            "do not fit the model's chat template: no system here",
        ),
        ([{"role": "nobody", "content": "w5"}], "messages.0.role: "),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([], "messages: "),
    ):
        with pytest.raises(RequestError, match=message):
            said(service, *messages)
    service.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="has no chat template; use /v1/completions") as refused:
        said(service, {"role": "user", "content": "w5"})
    assert refused.value.code == "no_chat_template"


def test_responses_and_counts(service: Service) -> None:
    found = answers(service, *asks(service, prompt=["w5", "w6 w7"], max_tokens=2))
    whole = COMPLETION.response("tiny", found)
    assert len(found) == 2
    for i, (choice, answer) in enumerate(zip(whole["choices"], found, strict=True)):
        assert (choice["index"], choice["text"]) == (i, answer.text)
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert whole["choices"][0]["polar_fx"] == {
        "program": "0-3 /4",
        "steps": 4,
        "probability": None,
        "rows": 2,
    }
    assert CHAT.response("tiny", found[:1])["choices"][0]["message"] == {
        "role": "assistant",
        "content": found[0].text,
    }
    counted = service.measures.text().decode()
    assert 'polar_fx_batch_rows_bucket{le="2.0",program="0-3 /4"}' in counted
    assert 'polar_fx_new_tokens_total{program="0-3 /4"}' in counted
