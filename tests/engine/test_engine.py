"""Requests that come and go between tokens: each gets what it gets alone."""

import copy
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import FAMILIES, PROGRAMS, compiled, dispatched_by_length, run
from polar_fx.compiled import CompiledModel, compile
from polar_fx.engine import Engine, Request, Sampling
from polar_fx.errors import EngineFullError, InputError, KvOverflowError
from polar_fx.program import Program
from tiny_models import make


def alone(model: CompiledModel, request: Request, *, program: Program) -> list[int]:
    """Greedy tokens of transformers' loop on slots of one row."""
    tokens: list[int] = []
    runner = model.runner
    with torch.no_grad(), runner.open_slots(program, 1) as session:
        (logits,) = runner.prefill(session, [torch.tensor(request.prompt)])
        while True:
            tokens.append(int(logits.argmax()))
            if len(tokens) == request.sampling.max_new_tokens:
                return tokens
            (logits,) = runner.decode(session, torch.tensor(tokens[-1:]))


def is_empty(model: CompiledModel, engine: Engine) -> bool:
    """Whether nothing is left of an engine."""
    engine.close()
    return model.runner.lockstep.store.num_blocks == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_join_and_leave_get_what_they_get_alone(family: str, seed: int) -> None:
    model, pick = compiled(family), random.Random(seed)
    engine = model.engine(max_rows=4, prefill_tokens=pick.choice((3, 16, 256)))
    requests, programs = [], []
    for _ in range(8):
        program = model.resolve(pick.choice(PROGRAMS))
        prompt = [pick.randrange(1, 90) for _ in range(pick.randint(1, 40))]
        how = Sampling(max_new_tokens=pick.randint(1, 24))
        requests.append(engine.add(prompt, program, how))
        programs.append(program)
        for _ in range(pick.randint(0, 6)):
            engine.step()
    run(engine)
    for request, program in zip(requests, programs, strict=True):
        generated = request.result(0)
        assert list(generated.tokens) == alone(model, request, program=program)
        assert generated.finish == "length" and generated.program == program
        assert list(request) == list(generated.tokens)
    assert engine.stats()["running"] == 0 and is_empty(model, engine)


def test_the_same_bits_whatever_runs_beside_in_deterministic_mode() -> None:
    model = compiled(deterministic=True)

    def scores(beside: int) -> Tensor:
        seen: list[Tensor] = []

        def watch(tokens: Tensor, logits: Tensor) -> Tensor:
            seen.append(logits)
            return logits

        engine = model.engine()
        how = Sampling(max_new_tokens=6, temperature=0.8, seed=3, processors=(watch,))
        for i in range(beside):
            engine.add([9] * (i + 1), model.resolve(PROGRAMS[i % 4]), Sampling(max_new_tokens=4))
        engine.add([5, 6, 7], model.resolve("skip 1"), how)
        engine.add([8] * 20, sampling=Sampling(max_new_tokens=9))
        run(engine)
        return torch.cat(seen)

    assert torch.equal(scores(0), scores(5))


def test_a_seed_draws_the_same_tokens_beside_others() -> None:
    model = compiled()

    def drawn(beside: int) -> tuple[int, ...]:
        engine = model.engine()
        how = Sampling(max_new_tokens=12, temperature=1.5, top_k=30, top_p=0.95, seed=11)
        request = engine.add([5, 6, 7], sampling=how)
        for i in range(beside):
            engine.add([i + 1], sampling=Sampling(max_new_tokens=9, temperature=1.0))
        run(engine)
        return request.result(0).tokens

    assert drawn(0) == drawn(3)


def test_settings_differ_by_row() -> None:
    model = compiled()
    engine = model.engine()
    plain = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=10))
    run(engine)
    (*_, stop) = tokens = plain.result(0).tokens[:4]
    first = tokens.index(stop)
    stopped = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=10, stop_tokens=(stop,)))
    forbidden = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=10, presence_penalty=1e4))
    again = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=10))
    run(engine)
    assert stopped.result(0).tokens == plain.result(0).tokens[: first + 1]
    assert stopped.result(0).finish == "stop"
    assert len(set(forbidden.result(0).tokens)) == 10
    assert again.result(0).tokens == plain.result(0).tokens


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + i % 26) for i in ids)


def test_texts_that_stop_are_left_out() -> None:
    model = compiled()
    engine = model.engine(tokenizer=Letters())
    plain = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=10))
    run(engine)
    text = plain.result(0).text or ""
    assert text == Letters().decode(list(plain.result(0).tokens), True)
    stopped = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=10, stop=(text[3:5], "!")))
    run(engine)
    found = stopped.result(0)
    assert found.text == text[: text.index(text[3:5])] and found.finish == "stop"
    assert len(found.tokens) == len(found.text or "") + 2
    with pytest.raises(InputError, match="need the engine's tokenizer"):
        model.engine().add([5], sampling=Sampling(stop=("a",)))


def test_the_dispatcher_chooses_for_requests_without_a_program() -> None:
    model = dispatched_by_length()
    engine = model.engine(prefill_tokens=4)
    prompts = [[7] * n for n in (2, 3, 4, 11, 12, 13)]
    requests = [engine.add(prompt, sampling=Sampling(max_new_tokens=6)) for prompt in prompts]
    named = engine.add([7] * 4, model.resolve("skip 0"), Sampling(max_new_tokens=6))
    run(engine)
    assert len({r.result(0).program for r in requests}) == 3
    for request in (*requests, named):
        program = request.result(0).program
        assert list(request.result(0).tokens) == alone(model, request, program=program)
    assert requests[0].result(0).probability == 1 and named.result(0).probability is None
    assert named.result(0).program == model.resolve("skip 0") and is_empty(model, engine)


def test_a_row_that_fails_ends_alone() -> None:
    def fails(tokens: Tensor, scores: Tensor) -> Tensor:
        if tokens.shape[1] > 5:
            raise ZeroDivisionError("of the user's own")
        return scores

    def nan(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores * float("nan")

    model = compiled()
    engine = model.engine()
    good = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=8))
    bad = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=8, processors=(fails,)))
    broken = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=8, processors=(nan,)))
    run(engine)
    assert list(good.result(0).tokens) == alone(model, good, program=model.default_program)
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        bad.result(0)
    with pytest.raises(ZeroDivisionError):
        list(bad)
    with pytest.raises(InputError, match="not finite"):
        broken.result(0)
    assert is_empty(model, engine)


def test_cancelled_at_any_moment() -> None:
    model, pick = compiled(), random.Random(0)
    engine = model.engine(max_rows=3, prefill_tokens=4)
    requests = []
    for _ in range(60):
        prompt = [pick.randrange(1, 90) for _ in range(pick.randint(1, 12))]
        requests.append(engine.add(prompt, sampling=Sampling(max_new_tokens=pick.randint(1, 5))))
        engine.step()
        if pick.random() < 0.5:
            pick.choice(requests).cancel()
    run(engine)
    ends = [request.result(0).finish for request in requests]
    assert {"cancelled", "length"} == set(ends) and is_empty(model, engine)
    for request, end in zip(requests, ends, strict=True):
        wanted = alone(model, request, program=model.default_program)
        got = list(request.result(0).tokens)
        assert got == wanted if end == "length" else got == wanted[: len(got)]


def test_a_text_that_cannot_be_decoded_ends_its_row_alone() -> None:
    class Broken(Letters):
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            if len(ids) == 3:
                raise UnicodeError("no such letter")
            return super().decode(ids, skip_special_tokens)

    model = compiled()
    engine = model.engine(tokenizer=Broken())
    bad, good = (engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=n)) for n in (3, 5))
    run(engine)
    with pytest.raises(UnicodeError, match="no such letter"):
        bad.result(0)
    assert len(good.result(0).tokens) == 5 and is_empty(model, engine)


def test_nobody_waits_for_an_engine_that_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    engine = model.engine()
    request = engine.add([5, 6, 7])
    monkeypatch.setattr(engine, "_decode", lambda: 1 / 0)
    with engine, pytest.raises(ZeroDivisionError):
        request.result(60)
    assert is_empty(model, engine)


def test_what_waits_is_bounded_and_served_in_order() -> None:
    engine = compiled().engine(max_rows=1, max_waiting=2, max_tokens=20)
    first = engine.add([1] * 10, sampling=Sampling(max_new_tokens=5))
    second = engine.add([2], sampling=Sampling(max_new_tokens=2))
    with pytest.raises(EngineFullError, match="2 requests wait already"):
        engine.add([3])
    with pytest.raises(KvOverflowError, match="exceed the 20 tokens"):
        engine.add([3] * 10, sampling=Sampling(max_new_tokens=12))
    while not first.is_done:
        assert not second.is_done
        engine.step()
    run(engine)
    assert len(second.result(0).tokens) == 2


def test_threads_add_and_read() -> None:
    model = compiled()
    wanted = [alone(model, _asked(i), program=model.default_program) for i in range(6)]
    found: dict[int, list[int]] = {}
    with model.engine(max_rows=3) as engine:

        def ask(number: int) -> None:
            asked = _asked(number)
            found[number] = list(engine.add(asked.prompt, sampling=asked.sampling))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        late = engine.add([1], sampling=Sampling(max_new_tokens=90))
    assert [found[i] for i in range(6)] == wanted
    assert late.is_done and is_empty(model, engine)
    with pytest.raises(InputError, match="closed"):
        engine.add([1])


def _asked(number: int) -> Request:
    return Request(
        [number + 1] * (number + 1), None, sampling=Sampling(max_new_tokens=7), number=number
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", float("nan")),
        ("top_k", -2),
        ("top_k", 2.5),
        ("max_new_tokens", True),
        ("seed", "seven"),
        ("stop", "abc"),
        ("stop", (5,)),
        ("stop_tokens", 5),
        ("processors", (None,)),
    ],
)
def test_settings_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{name} must be.*|{name} must be more"):
        Sampling(**{name: value})


def test_prompts_programs_and_limits_that_cannot_be() -> None:
    engine = compiled().engine()
    for prompt in ([1.5], "text", None, [], [[1, 2]], [100]):
        with pytest.raises(InputError):
            engine.add(prompt)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="program must be a Program, got 'skip 1'"):
        engine.add([1], "skip 1")  # type: ignore[arg-type]
    for name, value in (
        ("max_rows", 1.5),
        ("max_rows", True),
        ("kept_bytes", -1),
        ("max_tokens", "9"),
    ):
        with pytest.raises(InputError, match=f"{name} must be a whole number"):
            compiled().engine(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="copied"):
        copy.deepcopy(engine)


def test_rows_that_cannot_run_in_lock_step_take_turns() -> None:
    model = compile(make("llama"), "eager", max_length=100, cache=False)
    model.runner.addresses = False
    with pytest.raises(InputError, match="rows do not run in lock-step here: backend 'eager'"):
        model.start()
    engine, pick = model.engine(max_rows=3), random.Random(7)
    model.dispatcher = None
    requests = []
    for text in (*PROGRAMS, *PROGRAMS):
        prompt = [pick.randrange(1, 90) for _ in range(pick.randint(1, 40))]
        how = Sampling(max_new_tokens=pick.randint(1, 12))
        requests.append((engine.add(prompt, model.resolve(text), how), model.resolve(text)))
        engine.step()
    left = engine.add([5, 6, 7], sampling=Sampling(max_new_tokens=60))
    engine.step()
    left.cancel()
    run(engine)
    for request, program in requests:
        assert list(request.result(0).tokens) == alone(model, request, program=program)
    assert left.result(0).finish == "cancelled" and model.pool.num_bytes > 0
    free = sum(map(len, model.pool._free.values()))
    assert free == model.pool.num_slots, "every slot is free again"


def test_who_waits_is_told_of_each_token_and_of_the_end() -> None:
    model = compiled()
    news: list[Request] = []
    engine = model.engine()
    asked = [
        engine.add([5, 6], sampling=Sampling(max_new_tokens=3), on_news=news.append),
        engine.add([5, 6], sampling=Sampling(max_new_tokens=3), on_news=lambda request: request.no),  # type: ignore[attr-defined]
    ]
    run(engine)
    assert news == asked[:1] * 4 and [len(r.result(0).tokens) for r in asked] == [3, 3]
    assert [r.result(0).rows for r in asked] == [2, 2]
