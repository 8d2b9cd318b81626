"""Models whose layers keep a recurrent or convolutional state: any program is a plain loop over
their layers, however rows are cut, padded and batched.
"""

from typing import Any

import pytest
import torch
from transformers import Cache

from plain_loop import check_programs, check_rows, lost, plain_logits, random_programs
from polar_fx.backends import get_backend
from polar_fx.errors import InputError
from polar_fx.graph_files import export_program
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion
from polar_fx.runtime.generator import padded_rows
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.trunk import run_trunk, session_after
from slow_cases import some_slow
from tiny_bundles import compiled_hybrid, hybrid
from tiny_models import HYBRIDS, compiled, prompts, tiny

pytestmark = pytest.mark.skipif(
    not hasattr(Cache, "get_conv_state"), reason="caches of this transformers do not tell states"
)

ROWS = prompts(14, 9, 5, 1)


@pytest.mark.parametrize("family", HYBRIDS)
def test_any_program_is_a_plain_loop(family: str) -> None:
    check_programs(family, ROWS, count=2)


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_rows_of_several_programs(family: str, chunk: int) -> None:
    model = compiled(family)
    each = random_programs(model.depth, len(ROWS))
    check_rows(model, tiny(family).model, rows=ROWS, each=each, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, pytest.param(3, marks=pytest.mark.slow), 7, 512])
@pytest.mark.parametrize("family", some_slow(("lfm2", "qwen3_5_text"), ("qwen3_5_text",)))
def test_compiled_rows(family: str, chunk: int) -> None:
    """Skips, repeats and damping in one compiled batch, beside the interpreter."""
    model, eager = compiled(family, "inductor"), compiled(family)
    # few regions: several rows for each program, and a last step that keeps a state
    texts = ("0 (1)*2@0.5 0", "(0)*2") if chunk % 2 else ("1 0 1 0", "0")
    each = [Program.parse(texts[i % 2], 2) for i in range(len(ROWS))]
    check_rows(model, tiny(family).model, rows=ROWS, each=each, chunk=chunk)
    ids, mask = padded_rows([row.tolist() for row in ROWS])
    want = eager.forward(ids, mask, program=each)
    assert lost(model.forward(ids, mask, program=each), want) < 2e-5


@pytest.mark.slow
def test_a_second_start_traces_and_compiles_nothing() -> None:
    """Ahead of time, on the regions that a bundle of this model holds as well."""
    first, second, source = compiled_hybrid(), compiled_hybrid(), hybrid()
    options: Any = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    for text in ("identity", "(0)*2@0.5 1 0"):
        program, ids = first.resolve(text), ROWS[0][None]
        found = [model.generate(ids, program=text, **options)[0] for model in (first, second)]
        assert torch.equal(*found)
        want = plain_logits(source, program, row=found[0][:-1])[len(ROWS[0]) - 1 :]
        new = found[0][len(ROWS[0]) :]
        assert lost(want.gather(-1, new[:, None])[:, 0], want.amax(-1)) < 2e-4
    assert {r.source for r in second.regions.records} == {"loaded"}
    assert not second.library.is_traced


@pytest.mark.parametrize("backend", some_slow(("eager", "aot_inductor"), ("aot_inductor",)))
def test_verdicts_and_dispatch_of_rows(backend: str) -> None:
    """On the regions for one row: a verdict in two parts, and programs that go on after a trunk,
    which a former one must not have changed.
    """
    model, source, row = compiled_hybrid(backend), hybrid(), ROWS[0]
    whole, tokens = torch.cat((row, torch.tensor([7, 8]))), row.tolist()
    question = EncodedQuestion("q", tuple(tokens[:4]), tuple(tokens[4:]), ((7, 8),))
    each = [Program.parse(text, 2) for text in ("0-1", "0 (1 0)*2@0.5", "0 1 1")]
    judge = TeacherForcing(model)
    with run_trunk(model.runner, [row], num_steps=1) as trunk:
        for program in each:
            (verdict,) = judge.evaluate([(question, program)])  # a row at a time
            want = plain_logits(source, program, row=whole)[len(row) - 1 :]
            scores = want[:2].log_softmax(-1).gather(-1, whole[-2:, None])
            assert verdict.log_likelihood is not None
            assert abs(verdict.log_likelihood - float(scores.sum())) < 1e-3
            with session_after(model.runner, [program], trunk=trunk) as session:
                got = [model.runner.prefill(session, [row])[0]]
                got += [model.runner.decode(session, token)[0] for token in whole[-2:, None]]
            assert lost(torch.stack(got), want) < 2e-4


def test_a_prefill_is_the_prefill_of_one_token_less_and_a_decode() -> None:
    """Also what is held then: the last step of a prefill must not apply a token twice."""
    model = compiled("lfm2")
    runner, row = model.runner, ROWS[0]
    program = Program.from_path([1, 0], model.depth)  # its last step keeps a state
    with runner.open_slots(program, 1) as whole, runner.open_slots(program, 1) as cut:
        first = runner.prefill(whole, [row])[0]
        runner.prefill(cut, [row[:-1]])
        second = runner.decode(cut, row[-1:])[0]
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
        for one, other in zip(whole.slots, cut.slots, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a[..., :13, :], b[..., :13, :], rtol=0, atol=1e-4)


def test_padding_leaves_states_alone_and_sessions_are_given_back_empty() -> None:
    model = compiled("falcon_h1")
    runner, program = model.runner, Program.identity(model.depth)
    runner.prefill_chunk = 4
    with runner.open_slots(program, 2) as both, runner.open_slots(program, 1) as alone:
        runner.prefill(both, [ROWS[0], ROWS[2]])
        runner.prefill(alone, [ROWS[2]])
        for slot, own, spec in zip(both.slots, alone.slots, both.specs, strict=True):
            assert len(spec.states) == 2
            for part, want in zip(spec.held(slot, 5), spec.held(own, 5), strict=True):
                assert want.any()
                torch.testing.assert_close(part[1:], want, rtol=1e-4, atol=1e-5)
    with runner.open_slots(program, 2) as session:
        assert not any(bool(part.any()) for slot in session.slots for part in slot)


def test_beams_take_their_states_along() -> None:
    model, ids = compiled("lfm2"), ROWS[0][None]
    options: Any = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    source: Any = tiny("lfm2").model
    ours = model.generate(ids, **options)
    assert torch.equal(ours, source.generate(ids, pad_token_id=0, **options))


def test_a_verdict_goes_on_from_the_state_of_a_prefix() -> None:
    model, source = compiled("falcon_h1"), tiny("falcon_h1").model
    row = ROWS[0].tolist()
    question = EncodedQuestion("q", tuple(row[:4]), tuple(row[4:10]), (tuple(row[10:]), (7, 8)))
    for program in random_programs(model.depth, 2):
        (verdict,) = TeacherForcing(model).evaluate([(question, program)])
        found = []
        for target in question.targets:
            whole = torch.tensor([*row[:10], *target])
            scores = plain_logits(source, program, row=whole[:-1])[9:].log_softmax(-1)
            found.append(float(scores.gather(-1, torch.tensor(target)[:, None]).sum()))
        assert min(abs(verdict.log_likelihood - f) for f in found) < 1e-3


def test_what_cannot_hold_a_state_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("lfm2")
    says = "layer 0 keeps a recurrent or convolutional state, which .* does not hold yet"
    with pytest.raises(InputError, match=says):
        export_program(model, None, path=tmp_path / "program.pt2")
    with pytest.raises(InputError, match="rows do not run in lock-step here"):
        model.start()
    # where compiled code is not verified
    monkeypatch.setattr(LayerLibrary, "device", torch.device("cuda"))
    with pytest.raises(InputError, match=says):
        RegionTable(model.library, get_backend("inductor"), max_length=60, store=None, workers=0)
