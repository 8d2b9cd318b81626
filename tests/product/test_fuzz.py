"""The fuzz can tell right from wrong, and a seed is a case for good."""

import random

import pytest
import torch

from fuzz import FAMILIES, Case, Judge, call, random_program, run
from plain_loop import plain_logits
from polar_fx.compiled import compile
from polar_fx.program import Program
from tiny_models import make, prompts, reference


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_plain_loop_runs_the_program(family: str) -> None:
    model, row = make(family, num_hidden_layers=3), prompts(9)[0]
    before = list(model.modules())
    identity = plain_logits(model, Program.identity(3), row)
    torch.testing.assert_close(identity, reference(model, [row])[0], rtol=0, atol=1e-5)
    compiled = compile(model, "eager", max_length=31, cache=False)
    for text in ("0 2", "0 1 1 2", "(0-1)*2@0.5 2", "0 [(1)*2@0.25 2]@0.5"):
        want = plain_logits(model, Program.parse(text, 3), row)
        got = compiled.forward(row[None], program=text)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert not torch.allclose(want, identity, atol=1e-2)
    assert list(model.modules()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_beyond_the_limit(dtype: torch.dtype) -> None:
    model, row = make("llama", num_hidden_layers=3).to(dtype), prompts(9)[0]
    judge, program = Judge(model), Program.parse("0 1 1 2", 3)
    right = plain_logits(model, program, row)
    assert judge.of_logits(program, row, right) < 1
    wrong = plain_logits(model, Program.parse("0 1 2", 3), row)
    assert judge.of_logits(program, row, wrong) > 1
    assert judge.of_logits(program, row, torch.full_like(right, torch.nan)) > 1
    best, worst = (int(f(right[-1])) for f in (torch.argmax, torch.argmin))
    assert judge.of_tokens(program, row, [best]) < 1 < judge.of_tokens(program, row, [worst])


def test_tokens_are_judged_at_the_length_they_were_chosen_at() -> None:
    """Of a model that computes a row anew past a length, no longer row tells."""
    model = make("phi3", num_hidden_layers=3, **FAMILIES["phi3"])
    compiled, program = compile(model, "eager", max_length=31, cache=False), Program.identity(3)
    row = prompts(12)[0]
    new = compiled.generate(row[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert Judge(model).of_tokens(program, row, new[0, 12:].tolist()) < 1


def test_a_seed_is_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(s for s in range(100) if Case.of(s).backend == "eager")
    case = Case.of(seed)
    assert case == Case.of(seed) and str(case).startswith(f"seed {seed}: {case.family} eager")
    monkeypatch.setitem(call.__globals__["_CALLS"], "eager", 2)
    first, second = run(case), run(case)
    assert first["error"] is None and first["failed"] == []
    assert (first["calls"], first["worst"]) == (2, second["worst"])
    seen = [Case.of(s) for s in range(300)]
    assert {c.family for c in seen} == set(FAMILIES)
    assert len({(c.backend, c.dtype) for c in seen}) == 6
    drawn = {random_program(random.Random(s), 3) for s in range(50)}
    assert len(drawn) > 40 and any(p.blends for p in drawn)
