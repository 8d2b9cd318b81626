"""Rotary frequencies that depend on a row's length: each row is what the model makes of it alone,
beside longer ones, in parts, and when it grows past the length at which they change.

Shape legend: T tokens, V vocabulary.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError
from polar_fx.graph_files import export_program
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.questions.question import EncodedQuestion
from polar_fx.runtime.generator import padded_rows
from slow_cases import some_slow
from tiny_models import make, prompts, reference

SWITCH, LENGTH = 16, 47
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_SCALED = {**_PLAIN, "factor": 2.0, "original_max_position_embeddings": SWITCH}


def _longrope(size: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * size, "long_factor": [4.0] * size}
    return {**_SCALED, **factors, "rope_type": "longrope"}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", dict(rope_parameters={**_SCALED, "rope_type": "linear"})),
    "yarn": ("llama", dict(rope_parameters={**_SCALED, "rope_type": "yarn"})),
    "dynamic": (
        "llama",
        dict(rope_parameters={**_PLAIN, "rope_type": "dynamic", "factor": 2.0}),
    ),
    "longrope": (
        "phi3",
        dict(rope_parameters=_longrope(4), original_max_position_embeddings=SWITCH),
    ),
    "longrope of llama": ("llama", dict(rope_parameters=_longrope(4))),
    "longrope and a scale": (
        "phimoe",
        dict(
            rope_parameters={**_longrope(4), "short_mscale": 1.1, "long_mscale": 1.3},
            num_local_experts=4,
        ),
    ),
    "longrope of some layers": (
        "gemma3_text",
        dict(
            rope_parameters={"sliding_attention": _PLAIN, "full_attention": _longrope(8)},
        ),
    ),
}
OTHER = "(0-1)*2@0.5"


@functools.cache
def _model(kind: str) -> Any:
    family, options = KINDS[kind]
    layers = 3 if family == "gemma3_text" else 2
    return make(family, num_hidden_layers=layers, max_position_embeddings=LENGTH, **options)


@functools.cache
def _compiled(kind: str, chunk: int = 8) -> CompiledModel:
    return compile(_model(kind), "eager", max_length=LENGTH, prefill_chunk=chunk, cache=False)


def _same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-4)


each_kind = pytest.mark.parametrize(
    "kind", some_slow(KINDS, ("yarn", "longrope of llama", "longrope and a scale"))
)


@each_kind
@pytest.mark.parametrize("lengths", [(12, 6), (24, 10), (40, 16, 17), (17, 16)], ids=str)
def test_a_row_is_what_it_is_alone_in_the_model(kind: str, lengths: tuple[int, ...]) -> None:
    rows = prompts(*lengths)
    ids, mask = padded_rows([r.tolist() for r in rows])
    got = _compiled(kind).forward(ids, mask)
    for logits, real, want in zip(got, mask.bool(), reference(_model(kind), rows), strict=True):
        _same(logits[real], want)


@each_kind
def test_the_last_token_of_a_ragged_prompt_in_parts(kind: str) -> None:
    """Rows that go on after a part hold the right keys at the last step, too."""
    rows, compiled = prompts(40, 9, 21), _compiled(kind)
    with compiled.session(compiled.resolve(None), 3) as session:
        last = compiled.prefill(compiled.resolve(None), session, rows)
        after = compiled.decode(compiled.resolve(None), session, torch.tensor([3, 4, 5]))
    longer = [torch.cat((r, torch.tensor([t]))) for r, t in zip(rows, (3, 4, 5), strict=True)]
    wanted = reference(_model(kind), longer)
    for before, own, want in zip(last, after, wanted, strict=True):
        _same(before, want[-2])
        _same(own, want[-1])


@pytest.mark.parametrize("deterministic", [False, True])
@each_kind
def test_rows_grow_past_the_switch(kind: str, deterministic: bool) -> None:
    model = _model(kind)
    compiled = _compiled(kind)
    if deterministic:
        compiled = compile(model, "eager", max_length=LENGTH, deterministic=True, cache=False)
    rows, identity = prompts(15, 3, 20), compiled.resolve(None)
    steps = prompts(4, 4, 4)
    with compiled.session(identity, 3) as session:
        compiled.prefill(identity, session, rows)
        for step in range(4):
            rows = [torch.cat((r, s[step : step + 1])) for r, s in zip(rows, steps, strict=True)]
            got = compiled.decode(identity, session, torch.stack([s[step] for s in steps]))
            for own, want in zip(got, reference(model, rows), strict=True):
                _same(own, want[-1])
        more = prompts(2, 14, 5)  # the second of three crosses
        rows = [torch.cat(pair) for pair in zip(rows, more, strict=True)]
        got = compiled.runner.prefill(session, more, every=True)
        for own, part, want in zip(got, more, reference(model, rows), strict=True):
            _same(own, want[-len(part) :])


@each_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_past_the_switch(kind: str, beams: int) -> None:
    ids = prompts(12)[0][None]
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    # of rows that grow past the switch, only a model's own generate without a cache is consistent
    want = _model(kind).generate(ids, num_beams=beams, use_cache=False, **options)
    assert torch.equal(_compiled(kind).generate(ids, num_beams=beams, **options), want)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "longrope of some layers"])
@pytest.mark.parametrize("program", [OTHER, ["identity", OTHER]], ids=["one", "mixed"])
def test_other_programs_follow_the_same_law(kind: str, program: Any) -> None:
    """Prefill of all tokens, and of some with decoding past the switch, agree for any program."""
    compiled, rows = _compiled(kind), prompts(20, 13)
    ids, mask = padded_rows([r.tolist() for r in rows])
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    got = compiled.generate(ids, attention_mask=mask, program=program, **options)
    for i, row in enumerate(rows):
        own, text = program if isinstance(program, str) else program[i], row
        for _ in range(8):
            logits = compiled.forward(text[None], program=own)[0, -1]
            text = torch.cat((text, logits.argmax()[None]))
        assert got[i, 20:].tolist() == text[len(row) :].tolist()


@pytest.mark.parametrize("whole", [True, False], ids=["buffers too", "weights alone"])
def test_frequencies_in_the_models_own_dtype(whole: bool) -> None:
    """A model that was cast as a whole holds its frequencies rounded; one that was loaded so,
    does not.
    """
    family, options = KINDS["longrope"]
    model = make(family, num_hidden_layers=2, max_position_embeddings=LENGTH, **options)
    if whole:
        model = model.to(torch.bfloat16)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    compiled = compile(model, "eager", max_length=LENGTH, cache=False)
    for row in prompts(40, 16):
        want = reference(model, [row])[0]
        worst = (compiled.forward(row[None])[0] - want).abs().max()
        assert float(worst) < 0.05 * float(want.abs().max())


def test_the_first_part_of_a_prompt_shows_its_length() -> None:
    assert _compiled("longrope").prefill_chunk == SWITCH + 1
    assert _compiled("dynamic").prefill_chunk == 8
    short = compile(_model("longrope"), "eager", max_length=SWITCH, prefill_chunk=8, cache=False)
    assert short.prefill_chunk == 8 and short.runner.switch is None


def test_what_cannot_compute_a_row_anew_is_refused(tmp_path: Path) -> None:
    compiled = _compiled("longrope")
    with pytest.raises(InputError, match=f"past {SWITCH} tokens.*an exported program cannot"):
        export_program(compiled, None, path=tmp_path / "p.pt2")
    judge, identity = TeacherForcing(compiled), compiled.resolve(None)
    tokens = tuple(prompts(SWITCH)[0].tolist())
    assert judge.evaluate([(EncodedQuestion("fits", (), tokens, ((5,),)), identity)])
    with pytest.raises(InputError, match=f"take 17 tokens, and past {SWITCH}"):
        judge.evaluate([(EncodedQuestion("long", (), tokens, ((5, 6),)), identity)])
