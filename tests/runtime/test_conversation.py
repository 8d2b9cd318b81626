"""Conversations: what is kept between calls changes nothing but the cost."""

import functools

import pytest
import torch

from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, KvOverflowError
from polar_fx.runtime.kv_rows import KvRow
from tiny_models import make

PROGRAMS = ("identity", "skip 1", "repeat 0-1 x2 @0.5")
TEXT = torch.arange(3, 43)


@functools.cache
def compiled(family: str = "llama") -> CompiledModel:
    return compile(make(family), "eager", max_length=100, cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_are_those_of_the_whole_text(family: str, program: str) -> None:
    model = compiled(family)
    wanted = model.forward(TEXT[None], program=program)[0]
    with model.start(program) as talk:
        for start, stop in ((0, 5), (5, 6), (6, 22), (22, 40)):
            logits = talk.append(TEXT[start:stop])
            torch.testing.assert_close(logits, wanted[stop - 1], atol=1e-4, rtol=1e-4)
        talk.crop(20)
        logits = talk.append(TEXT[20:33])
        torch.testing.assert_close(logits, wanted[32], atol=1e-4, rtol=1e-4)
    assert model.runner.lockstep.store.num_blocks == 0


def test_turns_go_on_with_the_tokens_of_the_whole_text() -> None:
    model = compiled()
    with model.start("skip 1") as talk:
        said = TEXT[:9]
        for turn in (TEXT[:9], TEXT[20:27], TEXT[30:31]):
            said = turn if talk.tokens == [] else torch.cat((said, turn))
            new = talk.generate(turn, max_new_tokens=5)
            whole = model.generate(said[None], program="skip 1", max_new_tokens=5)
            assert new.tolist() == whole[0, len(said) :].tolist()
            said = whole[0]
            assert talk.tokens == said.tolist()
        assert talk.generate(max_new_tokens=2).tolist() == (
            model.generate(said[None], program="skip 1", max_new_tokens=2)[0, len(said) :].tolist()
        )


def test_a_further_turn_runs_its_own_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = compiled(), []
    run = model.runner.lockstep.run
    monkeypatch.setattr(
        model.runner.lockstep, "run", lambda *a, **k: (ran.append(a[1].shape[1]), run(*a, **k))[1]
    )
    with model.start() as talk:
        talk.generate(TEXT[:30], max_new_tokens=3)
        ran.clear()
        talk.generate(TEXT[30:34], max_new_tokens=1)
        assert ran == [5]  # the last new token was never fed back


def test_branches_go_on_apart_and_share_whole_blocks() -> None:
    model = compiled()
    store = model.runner.lockstep.store
    with model.start("repeat 0-1 x2") as talk:
        talk.append(TEXT[:20])
        held = store.num_blocks
        with talk.branch() as other:
            assert held < store.num_blocks < 2 * held
            mine, theirs = talk.append([50, 51]), other.append([60, 61])
            for logits, end in ((mine, [50, 51]), (theirs, [60, 61])):
                whole = torch.tensor([[*TEXT[:20].tolist(), *end]])
                wanted = model.forward(whole, program="repeat 0-1 x2")[0, -1]
                torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert store.num_blocks == held
    assert store.num_blocks == 0


def test_what_a_branch_shares_is_not_written_by_the_other() -> None:
    model = compiled()
    with model.start() as talk, torch.inference_mode():
        talk.append(TEXT[:20])
        with talk.branch() as other:
            talk.crop(5)
            talk.append([50] * 20)
            logits = other.append(TEXT[20:30])
    wanted = model.forward(TEXT[None, :30])[0, -1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert model.runner.lockstep.store.num_blocks == 0


def test_an_error_leaves_what_was_said_before() -> None:
    def fails(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == 14:
            raise ZeroDivisionError
        return scores

    model = compiled()
    with model.start() as talk:
        talk.append(TEXT[:5])
        with pytest.raises(ZeroDivisionError):
            talk.generate(TEXT[5:10], max_new_tokens=9, logits_processor=[fails])
        logits = talk.append(TEXT[5:8])
        wanted = model.forward(TEXT[None, :8])[0, -1]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_mode_ends_between_calls() -> None:
    model = compiled()
    with torch.inference_mode():
        talk = model.start()
        talk.append(TEXT[:5])
    logits = talk.append(TEXT[5:])
    with torch.inference_mode():
        talk.crop(3)
    talk.close()
    wanted = model.forward(TEXT[None])[0, -1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_rows_of_programs_that_share_steps_share_their_blocks() -> None:
    lockstep = compiled().runner.lockstep
    program, other = compiled().resolve("identity"), compiled().resolve("skip 1")
    row: KvRow = lockstep.row(program)
    row.make_room(16)
    row.length = 16
    branch = row.branch()
    branch.switch(other, 1)
    assert branch.table[0].tolist() == row.table[0].tolist()
    assert lockstep.store.num_blocks == row.num_held + branch.num_held - 1
    row.close()
    assert lockstep.store.num_blocks == branch.num_held
    branch.close()
    assert lockstep.store.num_blocks == 0


def test_what_is_refused() -> None:
    model = compiled()
    with model.start() as talk:
        for bad in ([1.5], ["a"], None, [[1, 2]], [100]):
            with pytest.raises(InputError, match="whole numbers|integer|vocabulary"):
                talk.append(bad)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="nothing to go on from"):
            talk.generate(max_new_tokens=2)
        talk.append(TEXT[:10])
        with pytest.raises(InputError, match=r"length 11 is not one of 0\.\.10"):
            talk.crop(11)
        with pytest.raises(InputError, match="num_beams"):
            talk.generate(max_new_tokens=2, num_beams=2)
        with pytest.raises(KvOverflowError):
            talk.append([1] * 91)
        with pytest.raises(KvOverflowError):
            talk.generate([1], max_new_tokens=95)
        assert talk.tokens == TEXT[:10].tolist()
