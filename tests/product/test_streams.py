"""Models whose layers hand on several streams side by side, [S, B, T, d]: any program is a plain
loop over the layers, however rows are cut, padded and batched.

Shape legend: B rows, T tokens, S streams, d hidden size, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from captured_decodes import FakeApi
from engines import ByLength, run
from plain_loop import check_kv_law, check_rows, lost
from polar_fx.capture import capture
from polar_fx.compiled import CompiledModel
from polar_fx.engine import Engine, Request, Sampling
from polar_fx.errors import InputError, UnsupportedModelError
from polar_fx.evaluation.block_influence import block_influences
from polar_fx.graph_files import export_program
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.predictor.features import Features
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.kv_store import Growth
from polar_fx.runtime.runner import Runner
from polar_fx.runtime.trunk import run_trunk, session_after
from shared_kv import programs_that_find
from streams import (
    KINDS,
    OWNERS,
    STREAMS,
    streams_compiled,
    streams_library,
    streams_logits,
    streams_model,
)
from tiny_models import make, make_slots, prompts, reference, run_rows

DEPTH = len(KINDS)
ROWS = prompts(14, 9, 5, 1)
TEXTS = ("0 1 2 3", "0 1 (2 3)*2@0.5 1 3", "0 1", "1 3 1 (0)*2 2")
SHARED = pytest.mark.parametrize("shared", [pytest.param(0, marks=pytest.mark.slow), 2])


def programs(shared: int) -> st.SearchStrategy[Program]:
    """Any of its programs that run."""
    return programs_that_find(DEPTH, owners=OWNERS if shared else {})


def _wanted(text: str, row: torch.Tensor, *, shared: int) -> torch.Tensor:
    return streams_logits(streams_model(shared), Program.parse(text, DEPTH), row=row)


@SHARED
def test_the_identity_is_the_model_and_the_plain_loop(shared: int) -> None:
    model, identity = streams_model(shared), Program.identity(DEPTH)
    got = run_rows(streams_library(shared), identity, rows=ROWS, prefill=(11, 6, 3, 1))
    for own, row, want in zip(got, ROWS, reference(model, ROWS), strict=True):
        assert lost(own, want) < 1e-4
        assert lost(streams_logits(model, identity, row=row), want) < 1e-5


@SHARED
def test_rows_and_tokens_are_the_first_axes_everywhere(shared: int) -> None:
    table = streams_library(shared).table
    assert table.owners == (OWNERS if shared else {})
    operands = [body.operands for body in table.bodies.values()]
    hidden = [o for each in operands for o in each if o.role == "hidden"]
    assert len(hidden) == len(table.bodies) - 1  # all but the prologue
    assert {o.size[:3] for o in hidden} == {("B", "T", str(STREAMS))}


@SHARED
def test_any_program_is_a_plain_loop(shared: int) -> None:
    """By the interpreter: ragged rows in two parts, and then token by token."""

    @settings(max_examples=4, deadline=None)
    @given(programs(shared))
    def check(program: Program) -> None:
        got = run_rows(streams_library(shared), program, rows=ROWS, prefill=(11, 6, 3, 1))
        for own, row in zip(got, ROWS, strict=True):
            assert lost(own, streams_logits(streams_model(shared), program, row=row)) < 2e-4

    check()


@settings(max_examples=2, deadline=None)
@given(st.lists(programs(2), min_size=4, max_size=4), st.sampled_from((1, 3, 512)))
def test_rows_of_several_programs(each: list[Program], chunk: int) -> None:
    _check(2, each, chunk=chunk)


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("chunk", [1, 3])
def test_rows_of_one_program(chunk: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_compiled(2).runner, "addresses", in_blocks)
    for text in TEXTS[1::2]:
        _check(2, [Program.parse(text, DEPTH)] * len(ROWS), chunk=chunk)


@pytest.mark.slow
@SHARED
def test_compiled_rows(shared: int) -> None:
    """Repeats, a blend, a last step that only reads, in one compiled batch in parts."""
    each = [Program.parse(TEXTS[i % 2], DEPTH) for i in range(len(ROWS))]
    _check(shared, each, chunk=3, backend="inductor")


def _check(shared: int, each: list[Program], *, chunk: int, backend: str = "eager") -> None:
    model = streams_compiled(shared, backend)
    source = streams_model(shared)
    check_rows(model, source, rows=ROWS, each=each, chunk=chunk, loop=streams_logits)


def test_a_prefill_is_the_prefill_of_one_token_less_and_a_decode() -> None:
    check_kv_law(
        streams_compiled(2), ROWS[0], programs=[Program.parse(text, DEPTH) for text in TEXTS]
    )


# ----------------------------------------------- verdicts, trunks, engines, what is seen and stays


@pytest.mark.slow
@pytest.mark.parametrize("cache_bytes", [1 << 30, 20_000])
def test_verdicts_of_rows_after_a_common_prefix(cache_bytes: int) -> None:
    """Also where states are dropped and computed again."""
    row = ROWS[0].tolist()
    question = EncodedQuestion("q", tuple(row[:4]), tuple(row[4:10]), (tuple(row[10:]),))
    alone = EncodedQuestion("p", (), tuple(row[:10]), (tuple(row[10:]),))
    judge = TeacherForcing(streams_compiled(2), cache_bytes=cache_bytes)
    for text in (*TEXTS, *TEXTS[::-1]):
        program = Program.parse(text, DEPTH)
        scores = _wanted(text, ROWS[0][:-1], shared=2)[9:].log_softmax(-1)
        want = float(scores.gather(-1, ROWS[0][10:, None]).sum())
        for verdict in judge.evaluate([(question, program), (alone, program)]):
            assert verdict.log_likelihood is not None
            assert abs(verdict.log_likelihood - want) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_programs_that_go_on_after_a_trunk(
    num_steps: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, the last of which is shorter."""
    runner, rows = streams_compiled(2).runner, list(ROWS[:2])
    monkeypatch.setattr(runner, "addresses", in_blocks)
    monkeypatch.setattr(runner, "prefill_chunk", 4)
    text = ("0 1 3 (2 1)*2@0.5 3", "0 1 2 3")[num_steps == 0]
    whole = torch.cat((ROWS[0], torch.tensor([7, 8])))
    with run_trunk(runner, rows, num_steps=num_steps) as trunk:
        assert [tuple(h.shape[:2]) for h in trunk.hidden] == [(14, STREAMS), (9, STREAMS)]
        for each in ([text, text], [text, "0 1 (3)*2@0.5 2"]):
            programs = [Program.parse(t, DEPTH) for t in each]
            with session_after(runner, programs, trunk=trunk) as session:
                got = [runner.prefill(session, rows)[0]]
                got += [runner.decode(session, token.expand(2))[0] for token in whole[-2:]]
            want = _wanted(text, whole, shared=2)[len(ROWS[0]) - 1 :]
            assert lost(torch.stack(got), want) < 2e-4


def test_what_a_predictor_sees_are_all_streams() -> None:
    with run_trunk(streams_compiled(2).runner, [ROWS[0]], num_steps=2) as trunk:
        (hidden,) = trunk.hidden
    size = hidden[0].numel()
    features = Features(num_steps=2, window=3)
    assert features.tokens(hidden).shape == (3, size)
    want = torch.cat([hidden[-1].flatten(), hidden[-3:].mean(0).flatten()])
    torch.testing.assert_close(features.pooled(hidden), want)


@pytest.mark.slow
def test_requests_of_several_programs_find_former_ones_again() -> None:
    """Past the window, whose blocks only the sliding layers give back."""
    model, first = streams_compiled(2), [7 + i % 50 for i in range(40)]
    engine = model.engine()
    for turn in (1, 2):
        asked = []
        for i, text in enumerate(TEXTS):
            asked.append(engine.add([*first, 5, turn + i], model.resolve(text), _greedy()))
        _check_requests(engine, asked)
    assert engine.stats()["found_tokens"] == len(TEXTS) * 32
    engine.close()


def test_requests_are_dispatched_by_what_the_shared_steps_make_of_all_streams() -> None:
    """In parts, and where hidden states of former requests are found again."""
    regions = streams_compiled(2).regions
    model = CompiledModel(Runner.of_model(streams_model(2), regions))
    model.runner.prefill_chunk = 8
    model.dispatch_by(ByLength(model), policy="accuracy").warmup()
    engine, first = model.engine(), [7 + i % 50 for i in range(40)]
    for turn in (1, 2):
        asked = [engine.add([*first, *[turn] * n], None, _greedy()) for n in (1, 2, 3)]
        _check_requests(engine, asked)
        assert len({request.program for request in asked}) > 1
    assert engine.stats()["found_tokens"] > 0
    engine.close()


def _greedy() -> Sampling:
    return Sampling(max_new_tokens=5)


def _check_requests(engine: Engine, asked: list[Request]) -> None:
    """Their tokens are the likeliest ones by the plain loop."""
    run(engine)
    for request in asked:
        tokens, program = request.result(0).tokens, request.program
        assert program is not None
        whole = torch.tensor([*request.prompt, *tokens])
        scores = streams_logits(streams_model(2), program, row=whole[:-1])
        want = scores[len(request.prompt) - 1 :]
        taken = want.gather(-1, whole[-len(tokens) :, None])[:, 0]
        assert lost(taken, want.amax(-1)) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_a_conversation(text: str) -> None:
    model, tokens = streams_compiled(2), torch.arange(3, 43)
    wanted = _wanted(text, tokens, shared=2)
    with model.start(text) as talk:
        for start, stop in ((0, 5), (5, 6), (6, 22), (22, 40)):
            assert lost(talk.append(tokens[start:stop]), wanted[stop - 1]) < 2e-4
        talk.crop(20)
        with talk.branch() as other:
            assert lost(other.append(tokens[20:33]), wanted[32]) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("in_blocks", [True, False])
def test_captured_decodes(in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a stand-in for its graphs: rows of different programs, some of which take no
    part in a call.
    """
    api = FakeApi()
    model = CompiledModel(Runner.of_model(streams_model(2), streams_compiled(2).regions))
    model.graphs = CudaGraphs(api)
    model.runner.lockstep.store.growth = Growth(part=1, least=400)
    monkeypatch.setattr(model.runner, "addresses", in_blocks)
    for each in (TEXTS, TEXTS[1:2] * 4):
        programs = list(map(model.resolve, each))
        check_rows(
            model, streams_model(2), rows=ROWS, each=programs, chunk=512, loop=streams_logits
        )
    assert api.count("replay") > 20


def test_influences_of_layers_are_those_of_all_streams() -> None:
    model, passed = streams_model(2), list[tuple[torch.Tensor, torch.Tensor]]()
    hooks = [
        layer.register_forward_hook(lambda _, given, made: passed.append((given[0], made)))
        for layer in model.model.layers
    ]
    reference(model, ROWS[:1])
    for hook in hooks:
        hook.remove()
    want = []
    for pair in passed:
        before, after = (state[:, 0].transpose(0, 1).flatten(1).double() for state in pair)
        want.append(1 - float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()))
    got = block_influences(streams_compiled(2), ROWS[:1])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------- files, and what is not


@pytest.mark.slow
def test_a_program_file(tmp_path: Path) -> None:
    """Of layers that each keep keys and values: others are refused, as with one stream."""
    model, text, length = streams_compiled(0), TEXTS[1], 32
    program = model.resolve(text)
    module = torch.export.load(
        export_program(model, program, path=tmp_path / "program.pt2")
    ).module()
    slots = make_slots(streams_library(0), program, batch=1, length=length)
    index = torch.arange(length)
    got = module(ROWS[0][None], index[None, :14], index, [p for slot in slots for p in slot])
    assert lost(got[0].detach(), _wanted(text, ROWS[0], shared=0)) < 2e-4
    with pytest.raises(InputError, match="reads the keys and values of layer 0, which an exported"):
        export_program(streams_compiled(2), program, path=tmp_path / "other.pt2")


class _Folding(LlamaDecoderLayer):
    """Folds the tokens of all rows into one axis."""

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
        rows = hidden_states.view(*given["position_ids"].shape, -1)
        return super().forward(rows, **given).flatten(0, 1)


class _Unfolding(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[None]


def test_hidden_states_without_an_axis_of_rows_are_refused() -> None:
    model = make("llama")
    layers = [_Folding(model.config, number) for number in range(2)]
    model.model.layers, model.model.norm = torch.nn.ModuleList(layers), _Unfolding()
    model.config.num_hidden_layers = 2
    says = r"hand on hidden states of shape \[2, 32\] for one row of two tokens.*axes of their own"
    with pytest.raises(UnsupportedModelError, match=says):
        capture(model)
