"""The fuzz can tell right from wrong, and a seed is a case for good."""

import random
from collections.abc import Callable

import pytest
import torch

import fuzz
from fuzz import FAMILIES, Case, run, summary
from fuzz_calls import (
    KINDS,
    Found,
    Judge,
    Setting,
    beams,
    dispatch,
    generate,
    random_program,
)
from plain_loop import plain_logits
from polar_fx.backends import EagerBackend
from polar_fx.compiled import compile
from polar_fx.errors import InputError
from polar_fx.program import Program
from polar_fx.runtime.runner import Runner
from tiny_models import make, prompts, reference


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_plain_loop_runs_the_program(family: str) -> None:
    model, row = make(family, num_hidden_layers=3), prompts(9)[0]
    before = list(model.modules())
    identity = plain_logits(model, Program.identity(3), row=row)
    torch.testing.assert_close(identity, reference(model, [row])[0], rtol=0, atol=1e-5)
    compiled = compile(model, "eager", max_length=31, cache=False)
    for text in ("0 2", "0 1 1 2", "(0-1)*2@0.5 2", "0 [(1)*2@0.25 2]@0.5"):
        want = plain_logits(model, Program.parse(text, 3), row=row)
        got = compiled.forward(row[None], program=text)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert not torch.allclose(want, identity, atol=1e-2)
    assert list(model.modules()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_beyond_the_limit(dtype: torch.dtype) -> None:
    model, row = make("llama", num_hidden_layers=3).to(dtype), prompts(9)[0]
    judge, program = Judge(model), Program.parse("0 1 1 2", 3)
    right = plain_logits(model, program, row=row)
    assert judge.of_logits(program, row, got=right) < 1
    wrong = plain_logits(model, Program.parse("0 1 2", 3), row=row)
    assert judge.of_logits(program, row, got=wrong) > 1
    assert judge.of_logits(program, row, got=torch.full_like(right, torch.nan)) > 1
    best, worst = (int(f(right[-1])) for f in (torch.argmax, torch.argmin))
    assert (
        judge.of_tokens(program, row, new=[best]) < 1 < judge.of_tokens(program, row, new=[worst])
    )


def test_tokens_are_judged_at_the_length_they_were_chosen_at() -> None:
    """Of a model that computes a row anew past a length, no longer row tells."""
    model = make("phi3", num_hidden_layers=3, **FAMILIES["phi3"])
    compiled, program = compile(model, "eager", max_length=31, cache=False), Program.identity(3)
    row = prompts(12)[0]
    new = compiled.generate(row[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert Judge(model).of_tokens(program, row, new=new[0, 12:].tolist()) < 1


def test_a_score_is_that_of_the_tokens() -> None:
    model, row = make("llama", num_hidden_layers=3), prompts(9)[0]
    judge, program = Judge(model), Program.parse("0 1 1 2", 3)
    logits = plain_logits(model, program, row=torch.cat((row, torch.tensor([5]))))
    score = sum(float(logits[8 + i].log_softmax(-1)[t]) for i, t in enumerate((5, 7)))
    assert judge.of_score(program, row, new=(5, 7), score=score) < 1
    for other in (score + 0.1, float("nan")):
        assert judge.of_score(program, row, new=(5, 7), score=other) > 1


@pytest.fixture(scope="module", params=["blocks", "slots"])
def setting(request: pytest.FixtureRequest) -> Setting:
    backend = EagerBackend()
    vars(backend)["by_address"] = request.param == "blocks"
    model = make("llama", num_hidden_layers=3)
    compiled = compile(model, backend, max_length=31, prefill_chunk=7, cache=False)
    return Setting(compiled, Judge(model), random.Random(0), 31)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_call(setting: Setting, kind: Callable[[Setting], Found]) -> None:
    """What is refused in slots raises there; the fuzz asks for it in blocks alone."""
    if kind is KINDS[-1] and not setting.compiled.runner.together:
        with pytest.raises(InputError, match="lock-step"):
            kind(setting)
        return
    assert kind(setting).worst < 1


def test_a_call_that_goes_wrong_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Runner.decode
    monkeypatch.setattr(Runner, "decode", lambda *args: plain(*args).roll(1, -1))
    monkeypatch.setattr(setting.rng, "randint", lambda low, high: high)
    for kind in (generate, beams, dispatch):
        assert kind(setting).worst > 1


def test_a_seed_is_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(s for s in range(100) if Case.of(s).backend == "eager")
    case = Case.of(seed)
    assert case == Case.of(seed) and str(case).startswith(f"seed {seed}: {case.family} eager")
    monkeypatch.setitem(fuzz._CALLS, "eager", 2)
    first, second = run(case), run(case)
    assert first["error"] is None and first["failed"] == []
    assert len(first["calls"]) == 2
    assert (first["calls"], first["worst"]) == (second["calls"], second["worst"])
    counted = summary([first, second])
    assert counted["calls"] == sum(counted["calls_of_kind"].values()) == 4
    assert counted["cases_of_way"] == {case.way: 2} and counted["failed"] == []
    seen = [Case.of(s) for s in range(300)]
    assert {c.family for c in seen} == set(FAMILIES)
    assert len({c.way for c in seen}) == 6
    for flag in ("deterministic", "slots", "at_limit"):
        assert {getattr(c, flag) for c in seen} == {True, False}
    drawn = {random_program(random.Random(s), 3) for s in range(50)}
    assert len(drawn) > 40 and any(p.blends for p in drawn)
