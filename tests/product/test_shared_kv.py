"""Models whose later layers read the keys and values of earlier ones: any program that keeps every
such owner before its readers is a plain loop over the layers, however rows are cut, padded and
batched; others are refused by name.

Shape legend: T tokens, V vocabulary.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captured_decodes import FakeApi
from engines import run
from plain_loop import check_kv_law, lost
from polar_fx import compile
from polar_fx.backends.base import RegionName, ShapeClass
from polar_fx.compiled import CompiledModel
from polar_fx.engine import Sampling
from polar_fx.errors import InputError, ProgramError
from polar_fx.graph_files import export_onnx, export_program
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.library.symbols import SymbolTable
from polar_fx.predictor.menu import Menu
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.runtime import checked_runs
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.generator import padded_rows
from polar_fx.runtime.kv_store import Growth
from polar_fx.runtime.link import region_calls
from polar_fx.runtime.runner import Runner
from polar_fx.runtime.trunk import run_trunk, session_after
from polar_fx.search.config import SearchConfig
from polar_fx.search.lockstep import run_searches
from polar_fx.search.methods.registry import METHODS
from polar_fx.training.mining import edits_as_programs
from shared_kv import (
    DEPTH,
    OWNERS,
    make_sharing,
    sharing_compiled,
    sharing_library,
    sharing_logits,
    sharing_model,
    sharing_programs,
)
from tiny_models import prompts, reference, run_rows

ROWS = prompts(14, 9, 5, 1)
TEXTS = ("0 1 2 3 4", "0 1 (2 3)*2@0.5 1 4 4", "0 1", "1 3 1 (0)*2 2")


def test_the_identity_is_the_model_and_the_plain_loop() -> None:
    identity = Program.identity(DEPTH)
    got = run_rows(sharing_library(), identity, rows=ROWS, prefill=(11, 6, 3, 1))
    for own, row, want in zip(got, ROWS, reference(sharing_model(), ROWS), strict=True):
        assert lost(own, want) < 1e-4
        assert lost(sharing_logits(identity, row), want) < 1e-5


def test_the_table_knows_who_reads_whom() -> None:
    table = sharing_library().table
    assert table.owners == OWNERS
    assert [spec.num_kv for spec in table.kv_specs] == [2, 2, 0, 0, 0]
    assert SymbolTable.from_json(table.to_json()) == table
    program = Program.parse("0 1 2 3 1 4 0 0 2 3", DEPTH)
    assert table.slot_steps(program) == [0, 1, 0, 1, 4, 4, 6, 7, 7, 4]


@pytest.mark.parametrize(
    ("text", "reader", "owner"), [("1 2 0", 2, 0), ("0 2 3", 3, 1), ("4", 4, 1)]
)
def test_a_program_that_skips_an_owner_is_refused(text: str, reader: int, owner: int) -> None:
    program = Program.parse(text, DEPTH)
    says = (
        f"layer {reader} reads the keys and values of layer {owner}, which program .* skips before "
        f"it; keep layer {owner} before layer {reader}"
    )
    library = sharing_library()
    for takes in (library.check, library.program_graph, sharing_compiled().resolve):
        with pytest.raises(ProgramError, match=says):
            takes(program)
    with pytest.raises(ProgramError, match=says):
        sharing_compiled().forward(ROWS[0][None], program=text)


@settings(max_examples=25, deadline=None)
@given(sharing_programs())
def test_any_program_is_a_plain_loop(program: Program) -> None:
    """By the interpreter: ragged rows in two parts, and then token by token."""
    for own, row in zip(
        run_rows(sharing_library(), program, rows=ROWS, prefill=(11, 6, 3, 1)), ROWS, strict=True
    ):
        assert lost(own, sharing_logits(program, row)) < 2e-4


@settings(max_examples=15, deadline=None)
@given(st.lists(sharing_programs(), min_size=4, max_size=4), st.sampled_from((1, 3, 7, 512)))
def test_rows_of_several_programs(each: list[Program], chunk: int) -> None:
    _check(sharing_compiled(), each, chunk=chunk)


@settings(max_examples=15, deadline=None)
@given(sharing_programs(), st.sampled_from((1, 3, 7, 512)))
def test_rows_of_one_program(program: Program, chunk: int) -> None:
    """In blocks and in slots."""
    model = sharing_compiled()
    try:
        for addresses in (True, False):
            model.runner.addresses = addresses
            _check(model, [program] * len(ROWS), chunk=chunk)
    finally:
        model.runner.addresses = True


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, 512])
def test_compiled_rows(chunk: int) -> None:
    """Repeated readers and owners, a last step that reads, in one compiled batch."""
    texts = ("0 1 2 3 4", "0 1 (2 3)*2@0.5 1 4 4")
    each = [Program.parse(texts[i % 2], DEPTH) for i in range(len(ROWS))]
    _check(sharing_compiled("inductor"), each, chunk=chunk)


def _check(model: CompiledModel, each: list[Program], *, chunk: int) -> None:
    """Logits of every token and greedy generation, a program a row, are the plain loop's."""
    model.runner.prefill_chunk = chunk
    ids, mask = padded_rows([row.tolist() for row in ROWS])
    logits = model.forward(ids, mask, program=each)
    options: Any = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate(ids, attention_mask=mask, program=each, **options)
    for i, (row, program) in enumerate(zip(ROWS, each, strict=True)):
        assert lost(logits[i, mask[i].bool()], sharing_logits(program, row)) < 2e-4
        new = output[i, ids.shape[1] :]
        want = sharing_logits(program, torch.cat((row, new[:-1])))[len(row) - 1 :]
        assert lost(want.gather(-1, new[:, None])[:, 0], want.amax(-1)) < 2e-4


@pytest.mark.parametrize(
    ("text", "whole", "cut", "last"),
    [
        ("0 1 2 3 4", [0], 1, [1, 2, 3, 4]),
        ("0 1 2 0 1", [0, 1, 2, 0], 1, [1]),
        ("1 3 0 (2)*2@0.5 3", [1, 3], 0, [0, 2, 2, 3]),
    ],
)
def test_what_only_reads_at_the_end_runs_for_tokens_whose_logits_are_wanted(
    text: str, whole: list[int], cut: int, last: list[int]
) -> None:
    table = sharing_library().table
    many, (start, *layers, head) = ShapeClass.of(1, 2, 64), table.calls()
    calls = region_calls(table, Program.parse(text, DEPTH), shape=many, every=False)
    bodies = [layer.target for layer in layers]
    wanted = [RegionName(start.target, many)]
    wanted += [RegionName(bodies[i], many) for i in whole]
    wanted += [RegionName(bodies[cut], many, kv_writes=True), RegionName(start.target, many.decode)]
    wanted += [RegionName(bodies[i], many.decode) for i in last]
    assert calls == [*wanted, RegionName(head.target, many.decode)]


# ------------------------------------------------------------ verdicts, trunks, engines, what stays


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(sharing_programs(), min_size=3, max_size=3))
def test_verdicts_of_rows_after_a_common_prefix(programs: list[Program]) -> None:
    row = ROWS[0].tolist()
    question = EncodedQuestion("q", tuple(row[:4]), tuple(row[4:10]), (tuple(row[10:]),))
    alone = EncodedQuestion("p", (), tuple(row[:10]), (tuple(row[10:]),))
    judge = TeacherForcing(sharing_compiled())
    verdicts = judge.evaluate([(q, p) for p in programs for q in (question, alone)])
    for i, program in enumerate(programs):
        scores = sharing_logits(program, ROWS[0][:-1])[9:].log_softmax(-1)
        want = float(scores.gather(-1, ROWS[0][10:, None]).sum())
        for verdict in verdicts[2 * i : 2 * i + 2]:
            assert verdict.log_likelihood is not None
            assert abs(verdict.log_likelihood - want) < 1e-3


@pytest.mark.slow
def test_a_verdict_is_the_same_after_states_were_dropped() -> None:
    """What a step reads stays as long as the state before it does."""
    row = ROWS[0].tolist()
    question = EncodedQuestion("q", tuple(row[:4]), tuple(row[4:10]), (tuple(row[10:]),))
    judge = TeacherForcing(sharing_compiled(), cache_bytes=20_000)
    for text in (*TEXTS, *TEXTS):
        program = Program.parse(text, DEPTH)
        (verdict,) = judge.evaluate([(question, program)])
        scores = sharing_logits(program, ROWS[0][:-1])[9:].log_softmax(-1)
        want = float(scores.gather(-1, ROWS[0][10:, None]).sum())
        assert verdict.log_likelihood is not None and abs(verdict.log_likelihood - want) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_programs_that_go_on_after_a_trunk(
    num_steps: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers after it read what it has written."""
    model, behind = sharing_compiled(), "3 (4 2)*2@0.5" if num_steps > 1 else "1 2 3"
    monkeypatch.setattr(model.runner, "addresses", in_blocks)
    program = Program.parse(f"0-{num_steps - 1} {behind} {num_steps}", DEPTH)
    whole = torch.cat((ROWS[0], torch.tensor([7, 8])))
    with run_trunk(model.runner, list(ROWS[:2]), num_steps=num_steps) as trunk:
        for each in ([program] * 2, [program, Program.identity(DEPTH)]):
            with session_after(model.runner, each, trunk=trunk) as session:
                got = [model.runner.prefill(session, list(ROWS[:2]))[0]]
                for token in whole[-2:]:
                    got.append(model.runner.decode(session, token.expand(2))[0])
            assert lost(torch.stack(got), sharing_logits(program, whole)[len(ROWS[0]) - 1 :]) < 2e-4


@pytest.mark.slow
def test_requests_of_several_programs_find_former_ones_again() -> None:
    """Past the window, whose blocks only the sliding layers give back."""
    model, first = sharing_compiled(), [7 + i % 50 for i in range(40)]
    engine = model.engine()
    for turn in (1, 2):
        asked = [
            (text, engine.add([*first, 5, turn + i], model.resolve(text), _greedy()))
            for i, text in enumerate(TEXTS)
        ]
        run(engine)
        for text, request in asked:
            tokens = request.result(0).tokens
            whole = torch.tensor([*request.prompt, *tokens])
            want = sharing_logits(model.resolve(text), whole[:-1])[len(request.prompt) - 1 :]
            assert lost(want.gather(-1, whole[-len(tokens) :, None])[:, 0], want.amax(-1)) < 2e-4
    assert engine.stats()["found_tokens"] == len(TEXTS) * 32
    engine.close()
    assert model.runner.lockstep.store.num_blocks == 0


def _greedy() -> Sampling:
    return Sampling(max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_a_conversation(text: str) -> None:
    model, tokens = sharing_compiled(), torch.arange(3, 43)
    wanted = sharing_logits(model.resolve(text), tokens)
    with model.start(text) as talk:
        for start, stop in ((0, 5), (5, 6), (6, 22), (22, 40)):
            assert lost(talk.append(tokens[start:stop]), wanted[stop - 1]) < 2e-4
    with model.start(text) as talk:
        talk.append(tokens[:23])
        talk.crop(20)
        with talk.branch() as other:
            assert lost(other.append(tokens[20:33]), wanted[32]) < 2e-4
        assert lost(talk.append(tokens[20:21]), wanted[20]) < 2e-4
    assert model.runner.lockstep.store.num_blocks == 0


@pytest.mark.slow
def test_beams_take_what_is_read_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, source = sharing_compiled(), ROWS[0][None], sharing_model()
    options: Any = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    want = source.generate(ids, pad_token_id=0, **options)  # type: ignore[operator]
    for in_blocks in (True, False):
        monkeypatch.setattr(model.runner, "addresses", in_blocks)
        assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.slow
@pytest.mark.parametrize("in_blocks", [True, False])
def test_captured_decodes(in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a stand-in for its graphs."""
    regions, api = sharing_compiled().regions, FakeApi()
    model = CompiledModel(Runner.of_model(sharing_model(), regions))
    model.graphs = CudaGraphs(api)
    model.runner.lockstep.store.growth = Growth(part=1, least=400)
    monkeypatch.setattr(model.runner, "addresses", in_blocks)
    for each in (TEXTS, TEXTS, TEXTS[1:2] * 4, TEXTS[1:2] * 4):
        _check(model, list(map(model.resolve, each)), chunk=512)
    assert api.count("replay") > 20


def test_a_window_that_is_full_late_is_checked() -> None:
    """With keys and values that are made up, of those layers that have some."""
    model = make_sharing(sliding_window=300, max_position_embeddings=512)
    compiled = compile(model, "eager", max_length=400, check=True, cache=False)
    assert checked_runs._late(model, 400) == [299]
    assert compiled.library.table.owners == OWNERS


def test_a_prefill_is_the_prefill_of_one_token_less_and_a_decode() -> None:
    check_kv_law(
        sharing_compiled(), ROWS[0], programs=[Program.parse(text, DEPTH) for text in TEXTS]
    )


# -------------------------------------------------------------------- what is searched, and refused


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_search_looks_at_programs_that_run(method: str) -> None:
    library = sharing_library()
    row = ROWS[1].tolist()
    rows = [
        (Question(n, "toy", n, ("1",)), EncodedQuestion(n, (), tuple(row[:7]), (tuple(row[7:]),)))
        for n in ("a", "b")
    ]
    config = SearchConfig(method=method, simulations=25)
    judge = TeacherForcing(sharing_compiled())
    records = list(run_searches(iter(rows), judge, DEPTH, config, runs=library.runs))
    looked_at = {each.program for record in records for each in record.explored}
    assert len(records) == 2 and len(looked_at) > 5
    assert all(map(library.runs, looked_at))


def test_a_menu_with_a_program_that_does_not_run_is_refused() -> None:
    model = sharing_compiled()
    edits = edits_as_programs(DEPTH, 0)
    bad = next(program for program in edits if not model.library.runs(program))
    with pytest.raises(ProgramError, match="reads the keys and values of layer"):
        model.dispatch_by(None, menu=Menu.of([bad], DEPTH), policy="identity")


def test_what_does_not_hold_shared_keys_and_values_says_so(tmp_path: Any) -> None:
    model = sharing_compiled()
    says = "layer 2 reads the keys and values of layer 0, which {} does not hold yet"
    with pytest.raises(InputError, match=says.format("an exported program")):
        export_program(model, None, path=tmp_path / "program.pt2")
    with pytest.raises(InputError, match=says.format("an ONNX graph")):
        export_onnx(model, tmp_path / "onnx")
    with pytest.raises(InputError, match=says.format("tier='whole'")):
        compile(sharing_model(), "aot_inductor", max_length=31, tier="whole")  # type: ignore[arg-type]
