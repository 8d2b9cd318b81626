"""Models whose layers keep several pairs of keys and values: all of them belong to the step, and
any program is a plain loop over the layers, however rows are cut, padded and batched; what stores
in another way is refused by name.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captured_decodes import FakeApi
from engines import run
from plain_loop import check_rows, lost, random_programs
from polar_fx.capture import capture
from polar_fx.capture.checked import capture_checked
from polar_fx.capture.extension import KV, Running, Store
from polar_fx.capture.stored import Stored
from polar_fx.compiled import CompiledModel
from polar_fx.engine import Sampling
from polar_fx.errors import UnsupportedModelError
from polar_fx.graph_files import export_program
from polar_fx.graph_files.program_file import described_slots
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.library import LayerLibrary
from polar_fx.library.symbols import SymbolTable
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.kv_store import Growth
from polar_fx.runtime.runner import Runner
from polar_fx.runtime.trunk import run_trunk, session_after
from several_attentions import (
    DEPTH,
    double_compiled,
    double_library,
    double_logits,
    double_model,
    make_double,
    make_with_experts,
)
from tiny_models import compiled_by, make, make_slots, prompts, reference, run_rows

ROWS = prompts(14, 9, 5, 1)
TEXTS = ("0 1 2", "0 (1 2)*2@0.5 0", "(2 0)*2", "1")
WITH_EXPERTS = "longcat_flash"
has_experts = pytest.mark.skipif(
    not importlib.util.find_spec(f"transformers.models.{WITH_EXPERTS}"),
    reason="this transformers has no such model",
)


def _programs(*texts: str) -> list[Program]:
    return [Program.parse(text, DEPTH) for text in texts]


def test_the_identity_is_the_model_and_the_plain_loop() -> None:
    identity, model = Program.identity(DEPTH), double_model()
    got = run_rows(double_library(), identity, rows=ROWS, prefill=(11, 6, 3, 1))
    for own, row, want in zip(got, ROWS, reference(model, ROWS), strict=True):
        assert lost(own, want) < 1e-4
        assert lost(double_logits(model, identity, row=row), want) < 1e-5


def test_any_program_is_a_plain_loop() -> None:
    """By the interpreter: ragged rows in two parts, and then token by token."""
    for program in (*_programs(*TEXTS), *random_programs(DEPTH, 6)):
        for own, row in zip(
            run_rows(double_library(), program, rows=ROWS, prefill=(11, 6, 3, 1)), ROWS, strict=True
        ):
            assert lost(own, double_logits(double_model(), program, row=row)) < 2e-4


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_rows_of_several_programs(chunk: int) -> None:
    """In one batch, on blocks."""
    model = double_compiled()
    assert model.runner.together
    _check(model, _programs(*TEXTS), chunk=chunk)


def test_rows_of_one_program_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double_compiled()
    monkeypatch.setattr(model.runner, "addresses", False)
    for text, chunk in zip(TEXTS[:2], (3, 512), strict=True):
        _check(model, _programs(text) * len(ROWS), chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, 512])
def test_compiled_rows(chunk: int) -> None:
    _check(double_compiled("inductor"), _programs(*TEXTS), chunk=chunk)


def _check(model: CompiledModel, each: list[Program], *, chunk: int) -> None:
    check_rows(model, double_model(), rows=ROWS, each=each, chunk=chunk, loop=double_logits)


@pytest.mark.parametrize("where", ["slots", "blocks"])
def test_a_prefill_is_the_prefill_of_one_token_less_and_a_decode(where: str) -> None:
    """By logits, and in slots by what is held: each step has all four parts of its own."""
    runner, row = double_compiled().runner, ROWS[0]
    program = Program.from_path([0, 1, 1], DEPTH)
    opened: Any = runner.open_slots if where == "slots" else runner.open
    with opened(program, 1) as whole, opened(program, 1) as cut:
        first = runner.prefill(whole, [row])[0]
        runner.prefill(cut, [row[:-1]])
        second = runner.decode(cut, row[-1:])[0]
        assert lost(first, double_logits(double_model(), program, row=row)[-1]) < 2e-4
        assert lost(second, first) < 2e-5
        if where == "blocks":
            return
        for one, other in zip(whole.slots, cut.slots, strict=True):
            assert [part.shape[1] for part in one] == [1, 1, 2, 2]
            for a, b in zip(one, other, strict=True):
                assert a[:, :, :14].any() and not a[:, :, 14:].any()
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        for once, again in zip(*whole.slots[1:], strict=True):  # of the repeated layer
            assert float((once - again).abs().max()) > 0.1
    with opened(program, 1) as session:
        assert not any(bool(part.any()) for slot in session.slots for part in slot)


def test_the_table_and_files_tell_every_pair() -> None:
    table = double_library().table
    again = SymbolTable.from_json(table.to_json())
    assert again == table and again.to_json() == table.to_json()
    spec = again.kv_specs[0]
    assert spec.roles == ("kv",) * 4 and spec.bytes_per_token() == (1 + 1 + 2 + 2) * 8 * 4
    assert not again.owners and again.ends_in_kv_writes(0)
    (described,) = described_slots([spec])
    assert described["more_keys"] == [{"heads": 2, "size": 8}] * 2


# ---------------------------------------------------- verdicts, trunks, engines, graphs, what stays


@pytest.mark.slow
def test_verdicts_of_rows_after_a_common_prefix() -> None:
    row = ROWS[0].tolist()
    question = EncodedQuestion("q", tuple(row[:4]), tuple(row[4:10]), (tuple(row[10:]),))
    judge = TeacherForcing(double_compiled())
    programs = [*_programs(*TEXTS), *random_programs(DEPTH, 3)]
    for program, verdict in zip(
        programs, judge.evaluate([(question, p) for p in programs]), strict=True
    ):
        scores = double_logits(double_model(), program, row=ROWS[0][:-1])[9:].log_softmax(-1)
        want = float(scores.gather(-1, ROWS[0][10:, None]).sum())
        assert verdict.log_likelihood is not None and abs(verdict.log_likelihood - want) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("in_blocks", [True, False])
def test_programs_that_go_on_after_a_trunk(
    in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = double_compiled()
    monkeypatch.setattr(model.runner, "addresses", in_blocks)
    (program,) = _programs("0 (2 1)*2@0.5")
    whole = torch.cat((ROWS[0], torch.tensor([7, 8])))
    want = double_logits(double_model(), program, row=whole)[len(ROWS[0]) - 1 :]
    with (
        run_trunk(model.runner, [ROWS[0]], num_steps=1) as trunk,
        session_after(model.runner, [program], trunk=trunk) as session,
    ):
        got = [model.runner.prefill(session, [ROWS[0]])[0]]
        got += [model.runner.decode(session, token[None])[0] for token in whole[-2:]]
    assert lost(torch.stack(got), want) < 2e-4


@pytest.mark.slow
def test_requests_find_former_ones_again_past_the_window() -> None:
    model, first = double_compiled(), [7 + i % 50 for i in range(40)]
    engine = model.engine()
    for turn in (1, 2):
        asked = [
            (text, engine.add([*first, 5, turn], model.resolve(text), Sampling(max_new_tokens=8)))
            for text in TEXTS
        ]
        run(engine)
        for text, request in asked:
            tokens = request.result(0).tokens
            whole = torch.tensor([*request.prompt, *tokens])
            logits = double_logits(double_model(), model.resolve(text), row=whole[:-1])
            want = logits[len(request.prompt) - 1 :]
            assert lost(want.gather(-1, whole[-len(tokens) :, None])[:, 0], want.amax(-1)) < 2e-4
    assert engine.stats()["found_tokens"] > 0
    engine.close()
    assert model.runner.lockstep.store.num_blocks == 0


@pytest.mark.slow
def test_a_conversation_goes_on_and_branches() -> None:
    model, tokens = double_compiled(), torch.arange(3, 43)
    (program,) = _programs(TEXTS[1])
    wanted = double_logits(double_model(), program, row=tokens)
    with model.start(program) as talk:
        talk.append(tokens[:23])
        talk.crop(20)
        with talk.branch() as other:
            assert lost(other.append(tokens[20:33]), wanted[32]) < 2e-4
        assert lost(talk.append(tokens[20:21]), wanted[20]) < 2e-4


@pytest.mark.slow
def test_captured_decodes() -> None:
    """As on CUDA, with a stand-in for its graphs."""
    regions, api = double_compiled().regions, FakeApi()
    model = CompiledModel(Runner.of_model(double_model(), regions))
    model.graphs = CudaGraphs(api)
    model.runner.lockstep.store.growth = Growth(part=1, least=400)
    for each in (TEXTS, TEXTS[1:2] * 4):
        _check(model, _programs(*each), chunk=512)
    assert api.count("replay") > 20


@pytest.mark.slow
@torch.no_grad()
def test_a_program_file_takes_all_parts(tmp_path: Path) -> None:
    (program,), length = _programs(TEXTS[1]), 32
    module = torch.export.load(
        export_program(double_compiled(), program, path=tmp_path / "program.pt2")
    ).module()
    slots = make_slots(double_library(), program, batch=1, length=length)
    got = module(
        ROWS[0][None],
        torch.arange(len(ROWS[0]))[None],
        torch.arange(length),
        [part for slot in slots for part in slot],
    )
    assert lost(got[0], double_logits(double_model(), program, row=ROWS[0])) < 2e-4


# ------------------------------------------------------------------------------ a type with experts


@pytest.mark.slow
@has_experts
@pytest.mark.parametrize(
    ("depth", "backend", "texts"),
    [
        (1, "eager", ("0", "(0)*2@0.5", "0 0", "0")),
        pytest.param(2, "eager", ("0 1", "0 (1)*2@0.5 0", "(1 0)*2", "1"), marks=pytest.mark.slow),
        pytest.param(2, "inductor", ("0 (1)*2@0.5 0",), marks=pytest.mark.slow),
    ],
)
def test_layers_of_two_attentions_with_experts(
    depth: int, backend: str, texts: tuple[str, ...]
) -> None:
    """Whose configuration counts attentions, not layers, and whose experts are a loop."""
    model = make_with_experts(WITH_EXPERTS, depth)
    library, rows = LayerLibrary(capture_checked(model)), ROWS[: len(texts)]
    assert library.depth == depth and model.config.num_hidden_layers == 2 * depth
    identity = Program.identity(depth)
    for own, want in zip(
        run_rows(library, identity, rows=ROWS, prefill=(11, 6, 3, 1)),
        reference(model, ROWS),
        strict=True,
    ):
        assert lost(own, want) < 2e-4
    compiled = compiled_by(library, model, backend=backend)
    each = [Program.parse(text, depth) for text in texts]
    check_rows(compiled, model, rows=rows, each=each, chunk=3, loop=double_logits)


# ---------------------------------------------------------------------------------- what is refused


class _Twice(nn.ModuleList):
    """A stack whose layers run twice."""

    def __getitem__(self, which: Any) -> Any:
        found: Any = super().__getitem__(which)
        return [*found, *found] if isinstance(which, slice) else found


def test_a_layer_that_runs_twice_in_a_forward_pass_is_refused() -> None:
    model = make("mistral", num_hidden_layers=2)
    model.model.layers = _Twice(model.model.layers)
    with pytest.raises(
        UnsupportedModelError,
        match=r"layer 0 of model.layers runs 2 times in one forward pass, and stores under the "
        r"numbers \[0\] of its cache; .* use a model whose own forward pass runs each of its",
    ):
        capture(model)


def test_a_number_of_two_layers_is_refused() -> None:
    model = make_double(2)
    model.model.layers[1].other.layer_idx = 1
    with pytest.raises(
        UnsupportedModelError, match="layers 0 and 1 of model.layers both store KV under number 1"
    ):
        capture(model)


def test_a_part_that_is_stored_twice_is_refused() -> None:
    model = make_double(1)
    model.model.layers[0].other.layer_idx = 1
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 of model.layers stores 2 times under number 1 \(kv\)"
    ):
        capture(model)


def test_what_is_stored_outside_of_all_layers_is_refused() -> None:
    """Unless it goes by the number of a layer."""
    model, keys = make("mistral", num_hidden_layers=2), torch.zeros(1, 2, 2, 8)
    outside = Running("Attention", "model.more", None, 0)
    stores = [Store(number, KV, (keys, keys), outside) for number in range(3)]
    assert Stored(model, stores[:2], stack="model.layers", depth=2).specs[1].heads == 2
    with pytest.raises(
        UnsupportedModelError,
        match="its Attention model.more stores KV under number 2, outside of the 2 layers of model",
    ):
        Stored(model, stores, stack="model.layers", depth=2)


class _Again(nn.Module):
    """A layer that runs another one twice, the second time under another number."""

    def __init__(self, layer: Any, number: int) -> None:
        super().__init__()
        self.layer, self.first, self.second = layer, layer.self_attn.layer_idx, number

    def forward(self, hidden_states: Any, **given: Any) -> Any:
        for number in (self.first, self.second):
            self.layer.self_attn.layer_idx = number
            hidden_states = self.layer(hidden_states, **given)
        return hidden_states


def test_a_layer_may_run_its_own_attention_twice() -> None:
    model = make("mistral", num_hidden_layers=1)
    model.model.layers[0] = _Again(model.model.layers[0], 7)
    library = LayerLibrary(capture_checked(model))
    assert [spec.num_kv for spec in library.table.kv_specs] == [4]
    program = Program.from_path([0, 0], 1)
    for own, row in zip(
        run_rows(library, program, rows=ROWS, prefill=(11, 6, 3, 1)), ROWS, strict=True
    ):
        assert lost(own, double_logits(model, program, row=row)) < 2e-4
