"""Captured decodes equal linked ones, with a stand-in for CUDA; on a GPU, test_cuda_graphs_gpu.py.

Shape legend: B batch.
"""

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from captured_decodes import DEPTH, PROGRAMS, FakeApi, HostWork, Pair, decode, step, steps
from polar_fx.compiled import CompiledModel, compile
from polar_fx.program import Program
from polar_fx.runtime import cuda_graphs
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.link import LinkedProgram, StepInputs
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner
from tiny_models import make, prompts


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=31, cache=False)


@pytest.fixture
def pair(plain: CompiledModel) -> Pair:
    """Eager regions; the captured one has a pool of its own, empty."""
    regions = RegionTable(plain.library, plain.backend, max_length=31, store=None)
    return Pair(CompiledModel(Runner.of_model(make("llama"), regions)), plain)


# --------------------------------------------------------------------------------- the same results


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_captureddecodes_have_the_bits_of_linked_ones(pair: Pair, program: str, batch: int) -> None:
    api = FakeApi()
    graphs = CudaGraphs(api)
    for _ in range(2):
        pair.check(graphs, program, batch=batch)
    assert api.count("capture") == 1, "the second session met the same slots"
    assert api.count("replay") == 7, "all but the first run"


def test_sessions_side_by_side_have_graphs_of_their_own(pair: Pair) -> None:
    api = FakeApi()
    graphs = CudaGraphs(api)
    want = decode(pair.plain, LinkedProgram.run, program="identity")
    for _ in range(2):
        taking_turns = [steps(pair.model, graphs.run, program="identity") for _ in range(3)]
        for i, tokens in enumerate(zip(*taking_turns, strict=True)):
            assert all(torch.equal(logits, want[i]) for logits in tokens)
    assert api.count("capture") == len(graphs) == 3, (
        "one for each set of slots, and the slots came back"
    )


def test_a_row_of_a_session_has_its_own_graph(pair: Pair) -> None:
    """Rows run alone, as deterministic=True does, lie at other addresses than the batch."""
    graphs, identity, token = CudaGraphs(FakeApi()), Program.identity(DEPTH), torch.tensor([9])
    with (
        pair.model.runner.open_slots(identity, 2) as session,
        pair.plain.runner.open_slots(identity, 1) as reference,
    ):
        for _ in range(3):
            want = step(
                pair.plain, LinkedProgram.run, program=identity, session=reference, tokens=token
            )
            for i in range(2):
                assert torch.equal(
                    step(
                        pair.model,
                        graphs.run,
                        program=identity,
                        session=session.row(i),
                        tokens=token,
                    ),
                    want,
                )
    assert len(graphs.records) == len(graphs) == 2


def test_results_are_not_overwritten_by_the_next_replay(pair: Pair) -> None:
    results = [
        (r, r.clone())
        for r in steps(pair.model, CudaGraphs(FakeApi()).run, program="identity", num_tokens=7)
    ]
    assert all(torch.equal(a, b) for a, b in results)
    assert len({r.data_ptr() for r, _ in results}) == len(results)


def test_inference_mode_may_come_and_go(pair: Pair) -> None:
    for model in (pair.model, pair.plain):
        # allocates the slots, which must not be inference tensors
        decode(model, LinkedProgram.run, program="identity")
    graphs = CudaGraphs(FakeApi())
    with torch.inference_mode():
        pair.check(graphs, "identity")
    pair.check(graphs, "identity")
    assert len(graphs) == 1


def test_threads_share_buffers_one_at_a_time(pair: Pair) -> None:
    graphs = CudaGraphs(FakeApi())
    wants = {p: decode(pair.plain, LinkedProgram.run, program=p) for p in PROGRAMS}
    with ThreadPoolExecutor(len(PROGRAMS)) as threads:
        got = list(
            threads.map(lambda p: (p, decode(pair.model, graphs.run, program=p)), PROGRAMS * 5)
        )
    assert all(torch.equal(logits, wants[p]) for p, logits in got)


def test_each_program_and_batch_is_captured_once_from_one_pool(pair: Pair) -> None:
    api = FakeApi()
    graphs = CudaGraphs(api)
    cases = list(itertools.product(PROGRAMS, (3, 2, 1)))  # the slots of three rows serve fewer, too
    for program, batch in cases:
        pair.check(graphs, program, batch=batch)
    assert api.count("pool") == len(set(map(id, api.pools))) == 1
    captured = {(record.program, record.batch) for record in graphs.records}
    assert captured == {(pair.model.resolve(program), batch) for program, batch in cases}
    assert all(
        r.reason is None and r.pool is api.pools[0] and r.capture_ms >= 0 for r in graphs.records
    )


def test_a_replay_waits_for_the_last_user_of_the_buffers_and_limit_zero_makes_none(
    pair: Pair,
) -> None:
    api = FakeApi()
    decode(pair.model, CudaGraphs(api).run, program="identity")
    assert [entry.split()[0] for entry in api.log] == [
        "pool",
        "wait",
        "capture",
        *["wait", "replay"] * 3,
    ]
    decode(pair.model, CudaGraphs(none := FakeApi(), limit=0).run, program="identity")
    assert none.log == ["pool"]


def test_the_least_recently_used_graph_is_dropped_but_none_in_use(pair: Pair) -> None:
    api = FakeApi()
    graphs = CudaGraphs(api, limit=2)
    pair.use(graphs, "skip 0")  # capture 0
    pair.use(graphs, "skip 1")  # capture 1
    pair.use(graphs, "skip 0", times=10)  # nobody has used graph 1 for ten runs
    pair.use(graphs, "skip 2")
    assert api.log[-5:] == ["capture 2", "synchronize", "reset 1", "wait", "replay 2"], (
        "its code has run: it is replayed at once"
    )
    assert len(graphs) == 2
    before = api.count("capture")
    for program in ("skip 0", "skip 1", "skip 2") * 3:
        pair.check(graphs, program)
    assert api.count("capture") == before and len(graphs) == 2, (
        "a program too many does not make all capture in turns"
    )


def test_a_graph_does_not_keep_slots_that_the_pool_gave_up(pair: Pair) -> None:
    graphs, identity = CudaGraphs(FakeApi(keep=False)), Program.identity(DEPTH)
    with pair.model.runner.open_slots(identity, 1) as session:
        step(pair.model, graphs.run, program=identity, session=session, tokens=torch.tensor([5]))
        slot = weakref.ref(session.slots[0][0].untyped_storage())
    with pair.model.runner.open_slots(identity, 2):  # the slots of one row are too small
        del session
    gc.collect()
    assert len(graphs) == 1
    assert slot() is None


def test_a_graph_keeps_its_linked_program(pair: Pair) -> None:
    """Or another one might get its id, and run this one's code."""
    graphs, made = CudaGraphs(FakeApi(keep=False)), []

    def run(linked: LinkedProgram, *args: Any) -> Tensor:
        copy = replace(linked)  # nobody else holds this one
        made.append(id(copy))
        return graphs.run(copy, *args)

    decode(pair.model, run, program="identity")
    assert len(set(made)) == len(graphs) == 4, "linked anew, captured anew"
    gc.collect()
    assert set(made) <= {id(o) for o in gc.get_objects() if type(o) is LinkedProgram}


def test_a_program_whose_code_has_run_is_captured_without_an_ordinary_run(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, ordinary = FakeApi(), []
    graphs, run = CudaGraphs(api), LinkedProgram.run

    def noted(linked: LinkedProgram, inputs: StepInputs) -> Tensor:
        if inputs.ids.shape[1] == 1:  # a decode
            ordinary.append(str(linked.program))
        return run(linked, inputs)

    def first(program: str, batch: int = 1) -> list[str]:
        """What ran by itself, not from within a replay, in one decode."""
        before = len(ordinary)
        decode(pair.model, graphs.run, program=program, batch=batch, num_tokens=1)
        replays = api.log[-1].startswith("replay")
        return ordinary[before + replays :]

    monkeypatch.setattr(LinkedProgram, "run", noted)
    assert len(first("identity")) == 1, "nothing is loaded yet"
    assert first("skip 1") == first("repeat 2") == []
    assert len(first("repeat 2 @0.5")) == 1, "the first that blends"
    assert first("repeat 1 @0.5") == []
    assert len(first("skip 1", batch=2)) == 1, "another number of rows may take other kernels"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoded_token_neither_copies_from_the_host_nor_waits(pair: Pair, batch: int) -> None:
    model, chosen = pair.model, pair.model.resolve("skip 1")
    # replays nothing: what is left is the work around it
    model.graphs = CudaGraphs(FakeApi(keep=False))
    token = torch.full((batch,), 5)
    with model.runner.open_slots(chosen, batch) as session:
        model.prefill(chosen, session, prompts(*range(3, 3 + batch)))
        model.decode(chosen, session, token)
        with HostWork() as seen:
            for _ in range(3):
                model.decode(chosen, session, token)
        assert session.lengths == [3 + i + 4 for i in range(batch)]
        assert session.positions([1] * batch).flatten().tolist() == session.lengths, (
            "the device counts along"
        )
    assert seen.found == []


def test_a_failed_capture_falls_back_and_says_why_once(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    api = FakeApi(fails=lambda number: number == 1)
    graphs = CudaGraphs(api)
    pair.check(graphs, "identity")
    try:
        raise ValueError("being handled by the caller, and no reason")
    except ValueError:
        for _ in range(2):
            pair.check(graphs, "skip 1")  # the failed capture ran half of it
    assert api.log[-3:] == ["capture 1", "synchronize", "pool"], (
        "not tried again; what comes next has a pool of its own"
    )
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "operation not permitted when stream is capturing" in caplog.text
    assert (
        graphs.records[-1].reason
        == "RuntimeError: operation not permitted when stream is capturing"
    )
    pair.check(graphs, "skip 1", batch=2)  # another batch is tried
    assert [r.reason is None for r in graphs.records] == [True, False, True]


def test_nothing_is_tried_for_ever_where_no_capture_works(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    api = FakeApi(fails=lambda number: True)
    graphs = CudaGraphs(api)
    for program in (*PROGRAMS, "skip 2", "skip 3"):
        pair.check(graphs, program)
    assert api.count("capture") == len(graphs.records) == 3
    assert "none is tried any more" in caplog.text


def test_errors_that_are_no_failed_capture_come_through(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeApi()
    monkeypatch.setattr(api, "capture", lambda pool, function: {}["a mistake in our code"])
    with pytest.raises(KeyError, match="mistake"):
        pair.use(CudaGraphs(api), "identity")


# ------------------------------------------------------------------------------------- prompts


def _prompt(pair: Pair, rows: list[Tensor], *, program: str = "identity") -> tuple[Tensor, Tensor]:
    """Logits [B, V] after rows of tokens, by the captured model and the other."""
    found = []
    for model in (pair.model, pair.plain):
        with model.runner.open_slots(model.resolve(program), len(rows)) as session:
            found.append(torch.stack(model.runner.prefill(session, rows)))
    return found[0], found[1]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_are_captured_when_met_again(pair: Pair, program: str, batch: int) -> None:
    api = FakeApi()
    pair.model.graphs = CudaGraphs(api)
    for turn in range(4):
        lengths = [6, *((2 + turn + i) % 6 + 1 for i in range(batch - 1))]  # the longest counts
        rows = [torch.arange(n) + 3 * turn + i for i, n in enumerate(lengths)]
        got, want = _prompt(pair, rows, program=program)
        assert torch.equal(got, want)
        assert api.count("capture") == (turn > 0) and api.count("replay") == turn
    got, want = _prompt(pair, [torch.arange(5)] * batch, program=program)
    assert torch.equal(got, want) and api.count("capture") == 1, "of other lengths when met again"


def test_decoding_goes_on_after_a_replayed_prompt(pair: Pair) -> None:
    api = FakeApi()
    pair.model.graphs = CudaGraphs(api)
    for turn in range(3):
        got, want = (
            _continued(model, torch.arange(6) + turn) for model in (pair.model, pair.plain)
        )
        assert torch.equal(got, want)
    assert len(pair.model.graphs.prompts) == len(pair.model.graphs) == 1


def _continued(model: CompiledModel, row: Tensor) -> Tensor:
    """Logits [3, V] of tokens after a prompt."""
    with model.runner.open_slots(model.default_program, 1) as session:
        model.runner.prefill(session, [row])
        tokens = (torch.tensor([token]) for token in (7, 8, 9))
        return torch.cat([model.runner.decode(session, token) for token in tokens])


def test_long_prompts_and_those_of_every_token_run_as_linked(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeApi()
    pair.model.graphs = CudaGraphs(api)
    for _ in range(3):
        found = []
        for model in (pair.model, pair.plain):
            with model.runner.open_slots(model.default_program, 1) as session:
                found += model.runner.prefill(session, [torch.arange(6)], every=True)
        assert torch.equal(*found) and found[0].shape[0] == 6
    monkeypatch.setattr(cuda_graphs, "MOST_TOKENS", 11)
    for _ in range(3):
        got, want = _prompt(pair, [torch.arange(6), torch.arange(4)])
        assert torch.equal(got, want)
    assert api.count("capture") == 0


def test_a_replayed_prompt_copies_nothing_from_the_host(pair: Pair) -> None:
    pair.model.graphs = CudaGraphs(FakeApi())
    for _ in range(2):
        _prompt(pair, [torch.arange(6)])
    graph = pair.model.graphs.prompts.last_used
    assert graph is not None
    with torch.no_grad(), HostWork() as seen:
        graph.replay()
    # casts are not: they stay on the device
    assert [what for what in seen.found if what != "aten._to_copy.default"] == []


def test_rows_one_by_one_are_captured_where_their_slots_are_met_again(pair: Pair) -> None:
    """As by `deterministic`: rows of a batch are prompts of one row, each on its own slots."""
    api = FakeApi()
    pair.model.graphs = CudaGraphs(api)
    for turn in range(3):
        with pair.model.runner.open_slots(pair.model.default_program, 3) as session:
            for i in range(3):
                pair.model.runner.prefill(session.row(i), [torch.arange(6) + i])
        assert api.count("capture") == 3 * (turn > 0)


def test_a_prompt_that_cannot_be_captured_leaves_decodes_alone(pair: Pair) -> None:
    api = FakeApi(fails=lambda number: number == 0)
    pair.model.graphs = graphs = CudaGraphs(api)
    rows = [torch.arange(6)]
    for _ in range(3):
        got, want = _prompt(pair, rows)
        assert torch.equal(got, want)
    (failed,) = graphs.prompts.records
    assert failed.reason is not None and failed.tokens == 6, "tried once"
    pair.check(graphs, "identity")
    assert [r.reason is None for r in graphs.records] == [True]


def test_prompts_never_drop_the_graphs_of_decodes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_PROMPTS", 2)
    pair.model.graphs = graphs = CudaGraphs(FakeApi(), limit=4)
    pair.check(graphs, "identity")
    for length in (3, 4, 5, 6, 7):
        for _ in range(2):
            _prompt(pair, [torch.arange(length)])
    assert len(graphs) == 1 and len(graphs.prompts) == 2
    pair.model.graphs = without = CudaGraphs(FakeApi(), captures_prompts=False)
    for _ in range(3):
        _prompt(pair, [torch.arange(6)])
    assert not without.prompts.records
