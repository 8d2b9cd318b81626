"""Keys and values that requests find again: the same logits, less work, bounded memory."""

import random

import pytest
import torch
from torch import Tensor

from engines import FAMILIES, PROGRAMS, compiled, dispatched_by_length, run
from polar_fx.engine import Engine, Request, Sampling
from polar_fx.program import Program

FIRST = [7 + i % 50 for i in range(40)]


class Watched:
    """Keeps the scores that a request was sampled from."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores)
        return scores


def asked(engine: Engine, prompt: list[int], *, program: Program | None, new: int = 4) -> Tensor:
    """Scores [new, V] of a request that runs alone."""
    watched = Watched()
    engine.add(prompt, program, Sampling(max_new_tokens=new, processors=(watched,)))
    run(engine)
    return torch.cat(watched.scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_with_and_without(family: str) -> None:
    model, pick = compiled(family), random.Random(3)
    with_kept, without = model.engine(), model.engine(kept_bytes=0)
    for text in PROGRAMS:
        program = model.resolve(text)
        for length in (40, 33, 16, 40):
            prompt = FIRST[:length] + [pick.randrange(1, 90) for _ in range(pick.randint(1, 9))]
            one, two = (
                asked(with_kept, prompt, program=program),
                asked(without, prompt, program=program),
            )
            torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    assert with_kept.stats()["found_tokens"] == len(PROGRAMS) * (32 + 16 + 32)
    assert without.stats()["found_tokens"] == without.stats()["kept_bytes"] == 0
    with_kept.close()
    assert model.runner.lockstep.store.num_blocks == 0


def test_a_second_turn_finds_the_first_with_its_answer() -> None:
    model = compiled()
    engine = model.engine()
    first = engine.add(FIRST, sampling=Sampling(max_new_tokens=20))
    run(engine)
    turn = [*FIRST, *first.result(0).tokens, 5, 6, 7]
    asked(engine, turn, program=None)
    assert engine.stats()["found_tokens"] == 48, "of 59 that the first held"
    asked(engine, FIRST, program=model.resolve("skip 1"))
    assert engine.stats()["found_tokens"] == 48, "another program finds nothing"
    engine.close()


def test_programs_share_the_steps_that_are_the_same() -> None:
    """The dispatcher runs the first step of all programs; each then goes on with its own."""
    model = dispatched_by_length()
    assert model.dispatcher is not None and len(model.dispatcher.menu) == 3
    engine, without = model.engine(), model.engine(kept_bytes=0)
    for length in (33, 34, 35, 33, 36):
        prompt = FIRST[:length]
        one, two = asked(engine, prompt, program=None), asked(without, prompt, program=None)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    # first steps are found by all but the first; all steps by those whose program ran before
    assert engine.stats()["found_tokens"] == 4 * 32 + 2 * 32
    engine.close()
    assert model.runner.lockstep.store.num_blocks == 0


def test_what_was_used_least_recently_goes() -> None:
    model = compiled()
    store = model.runner.lockstep.store
    engine = model.engine()
    asked(engine, [1] * 17, program=None, new=1)
    block = engine.stats()["kept_bytes"]
    engine.close()
    assert block == 4 * store.num_bytes // store.num_allocated, "of the model's four layers"
    engine = model.engine(kept_bytes=3 * block)
    for first in (1, 2, 3):
        asked(engine, [first] * 17, program=None, new=1)
    asked(engine, [1] * 17, program=None, new=1)  # is now the latest
    assert engine.stats() | {"found_tokens": 16, "kept_bytes": 3 * block} == engine.stats()
    asked(engine, [4] * 17, program=None, new=1)
    asked(engine, [1] * 17, program=None, new=1)
    assert engine.stats()["found_tokens"] == 32
    asked(engine, [2] * 17, program=None, new=1)
    assert engine.stats()["found_tokens"] == 32, "it was the one to go"
    long = engine.add([9] * 90, sampling=Sampling(max_new_tokens=1))
    run(engine)
    assert long.result(0).tokens and engine.stats()["kept_bytes"] <= 3 * block
    assert store.num_blocks * (block // 4) == engine.stats()["kept_bytes"]
    engine.close()


def test_rows_that_begin_alike_run_together() -> None:
    model = compiled()
    engine = model.engine()
    asked(engine, FIRST, program=None)
    requests = [
        engine.add([*FIRST, i], model.resolve(text), Sampling(max_new_tokens=5))
        for i, text in enumerate(PROGRAMS * 2, start=1)
    ]
    run(engine)
    again: list[Request] = []
    for request in requests:
        alone = model.engine(kept_bytes=0)
        again.append(alone.add(request.prompt, request.program, request.sampling))
        run(alone)
    for request, other in zip(requests, again, strict=True):
        assert request.result(0).tokens == other.result(0).tokens
    engine.close()
    assert model.runner.lockstep.store.num_blocks == 0


def test_changed_weights_find_nothing() -> None:
    model = compiled()
    engine = model.engine()
    before = asked(engine, FIRST, program=None)
    weight = model.library.tensors[next(n for n in model.library.tensors if "q_proj" in n)]
    with torch.no_grad():
        weight.mul_(0.5)
    after = asked(engine, FIRST, program=None)
    assert engine.stats()["found_tokens"] == 0 and not torch.equal(before, after)
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(asked(engine, FIRST, program=None), before)
    assert engine.stats()["found_tokens"] == 0
    engine.close()


def test_nothing_is_kept_where_bits_count() -> None:
    model = compiled(deterministic=True)
    engine = model.engine()
    one, two = asked(engine, FIRST, program=None), asked(engine, FIRST, program=None)
    assert torch.equal(one, two) and engine.stats()["kept_bytes"] == 0


def test_prompts_whose_program_is_not_chosen_run_in_parts_beside_others() -> None:
    """Nobody waits for the shared steps of a long prompt, and they are batched as others are."""
    model = dispatched_by_length()
    engine = model.engine(prefill_tokens=16, kept_bytes=0)
    first = engine.add([5, 6, 7], model.resolve("skip 1"), Sampling(max_new_tokens=20))
    engine.step()
    prompts = [FIRST[:n] for n in (40, 12, 31, 13)]
    late = [engine.add(prompt, sampling=Sampling(max_new_tokens=3)) for prompt in prompts]
    before = len(first.tokens)
    engine.step()
    assert len(first.tokens) == before + 1 and not any(request.tokens for request in late)
    run(engine)
    for request, prompt in zip(late, prompts, strict=True):
        alone = model.engine(kept_bytes=0)
        other = alone.add(prompt, sampling=Sampling(max_new_tokens=3))
        run(alone)
        assert request.result(0).tokens == other.result(0).tokens
        assert request.result(0).program == other.result(0).program
    engine.close()
    assert model.runner.lockstep.store.num_blocks == 0


def test_a_row_of_the_shared_steps_alone_is_not_taken_for_them() -> None:
    """It holds the same keys and values, but no hidden states to go on from."""
    model = dispatched_by_length()
    engine, without = model.engine(), model.engine(kept_bytes=0)
    assert model.dispatcher is not None
    shared = Program.from_path(range(model.dispatcher.num_steps), model.depth)
    asked(engine, FIRST[:20], program=shared)
    one, two = (asked(e, FIRST[:36], program=None) for e in (engine, without))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    asked(engine, [*FIRST[:36], 5, 6], program=shared)
    one, two = (asked(e, [*FIRST, 4, 5], program=None) for e in (engine, without))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    engine.close()


def test_a_request_is_cancelled_before_its_program_is_chosen() -> None:
    model = dispatched_by_length()
    engine = model.engine(prefill_tokens=8)
    request = engine.add(FIRST, sampling=Sampling(max_new_tokens=3))
    engine.step()
    request.cancel()
    run(engine)
    assert request.result(0).finish == "cancelled" and not request.tokens
    again = engine.add(FIRST, sampling=Sampling(max_new_tokens=3))
    run(engine)
    assert len(again.result(0).tokens) == 3
    engine.close()
    assert model.runner.lockstep.store.num_blocks == 0
