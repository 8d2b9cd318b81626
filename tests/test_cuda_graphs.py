"""Captured decodes equal linked ones; the logic with a stand-in for CUDA anywhere, the real thing where there is a GPU.

Shape legend: B batch, V vocabulary.
"""

import gc
import itertools
import random
import statistics
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polar_fx.backends import ShapeClass
from polar_fx.compiled import CompiledModel, compile
from polar_fx.program import Program
from polar_fx.runtime.cuda_graphs import CudaApi, CudaGraphs
from polar_fx.runtime.link import LinkedProgram
from tiny_models import make, prompts

DEPTH = 4
PROGRAMS = ("identity", "skip 1", "skip 0, repeat 2 x3", "repeat 1-2 x2 @0.5")
Run = Callable[..., Tensor]


# ------------------------------------------------------------------------------------- a stand-in for CUDA graphs


@dataclass
class _FakeGraph:
    """Replaying calls the function again: it is bound to the buffers and slots of its capture, as a graph is."""

    log: list[str]
    number: int
    function: Callable[[], object]

    def replay(self) -> None:
        self.log.append(f"replay {self.number}")
        self.function()

    def reset(self) -> None:
        self.log.append(f"reset {self.number}")


class _FakeApi:
    """Notes every call. A capture runs nothing, as on CUDA; `fails` says which captures go wrong, half executed."""

    def __init__(self, fails: Callable[[int], bool] = lambda number: False, keep: bool = True) -> None:
        self.log: list[str] = []
        self.pools: list[Any] = []
        self._numbers, self._fails, self._keep = itertools.count(), fails, keep

    def new_pool(self) -> Any:
        self.log.append("pool")
        return object()

    def capture(self, pool: Any, function: Callable[[], object]) -> _FakeGraph:
        number = next(self._numbers)
        self.log.append(f"capture {number}")
        self.pools.append(pool)
        if self._fails(number):
            function()
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
            finally:
                raise RuntimeError("ending the capture failed, too")
        return _FakeGraph(self.log, number, function if self._keep else lambda: None)

    def wait(self) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def count(self, what: str) -> int:
        return sum(entry.startswith(what) for entry in self.log)


@torch.no_grad()
def _step(model: CompiledModel, run: Run, program: Program, session: Any, tokens: Tensor) -> Tensor:
    """Logits [B, V] of one more token a row, as CompiledModel decodes."""
    batch = len(tokens)
    linked = model.linker.link(program, ShapeClass.of(batch, 1, model.pool.length))
    logits = run(linked, tokens[:, None].to(model.device), session.positions([1] * batch), session.slots)
    session.advance([1] * batch)
    return logits[:, 0]


def _steps(
    model: CompiledModel, run: Run, program: str | Program, batch: int = 1, num_tokens: int = 4
) -> Generator[Tensor, None, None]:
    """Logits [B, V] of each token of a session, after a ragged prefill."""
    chosen = model.resolve(program)
    with model.session(chosen, batch) as session:
        model.prefill(chosen, session, prompts(*(3 + 2 * i for i in range(batch))))
        for i in range(num_tokens):
            yield _step(model, run, chosen, session, (torch.arange(batch) + 7 * i + 3) % 100)


def _decode(model: CompiledModel, run: Run, program: str | Program, batch: int = 1, num_tokens: int = 4) -> Tensor:
    """Logits [n, B, V] of the tokens of one session."""
    return torch.stack(list(_steps(model, run, program, batch, num_tokens))).cpu()


@dataclass
class _Pair:
    """A model whose decodes are captured, and the reference."""

    model: CompiledModel
    plain: CompiledModel
    tolerance: float = 0

    def check(self, graphs: CudaGraphs, program: str | Program, batch: int = 1) -> None:
        """A session of captured decodes equals one of linked decodes."""
        got, want = _decode(self.model, graphs.run, program, batch), _decode(self.plain, LinkedProgram.run, program, batch)
        torch.testing.assert_close(got, want, rtol=0, atol=self.tolerance)

    def use(self, graphs: CudaGraphs, program: str, times: int = 1) -> None:
        for _ in range(times):
            _decode(self.model, graphs.run, program, num_tokens=1)


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=31, cache=False)


@pytest.fixture
def pair(plain: CompiledModel) -> _Pair:
    """Eager regions; the captured one has a pool of its own, empty."""
    return _Pair(CompiledModel(make("llama"), plain.library, plain.backend, 31, 512, deterministic=False, program=None), plain)


# ------------------------------------------------------------------------------------------------ the same results


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_captured_decodes_have_the_bits_of_linked_ones(pair: _Pair, program: str, batch: int) -> None:
    api = _FakeApi()
    graphs = CudaGraphs(api)
    for _ in range(2):
        pair.check(graphs, program, batch)
    assert api.count("capture") == 1, "the second session met the same slots"
    assert api.count("replay") == 7, "all but the first run"


def test_sessions_side_by_side_have_graphs_of_their_own(pair: _Pair) -> None:
    api = _FakeApi()
    graphs = CudaGraphs(api)
    want = _decode(pair.plain, LinkedProgram.run, "identity")
    for _ in range(2):
        taking_turns = [_steps(pair.model, graphs.run, "identity") for _ in range(3)]
        for i, steps in enumerate(zip(*taking_turns, strict=True)):
            assert all(torch.equal(logits, want[i]) for logits in steps)
    assert api.count("capture") == len(graphs) == 3, "one for each set of slots, and the slots came back"


def test_a_row_of_a_session_has_its_own_graph(pair: _Pair) -> None:
    """Rows run alone, as deterministic=True does, lie at other addresses than the batch."""
    graphs, identity, token = CudaGraphs(_FakeApi()), Program.identity(DEPTH), torch.tensor([9])
    with pair.model.session(identity, 2) as session, pair.plain.session(identity, 1) as reference:
        for _ in range(3):
            want = _step(pair.plain, LinkedProgram.run, identity, reference, token)
            for i in range(2):
                assert torch.equal(_step(pair.model, graphs.run, identity, session.row(i), token), want)
    assert len(graphs.records) == len(graphs) == 2


def test_results_are_not_overwritten_by_the_next_replay(pair: _Pair) -> None:
    results = [(r, r.clone()) for r in _steps(pair.model, CudaGraphs(_FakeApi()).run, "identity", num_tokens=7)]
    assert all(torch.equal(a, b) for a, b in results)
    assert len({r.data_ptr() for r, _ in results}) == len(results)


def test_inference_mode_may_come_and_go(pair: _Pair) -> None:
    for model in (pair.model, pair.plain):
        _decode(model, LinkedProgram.run, "identity")  # allocates the slots, which must not be inference tensors
    graphs = CudaGraphs(_FakeApi())
    with torch.inference_mode():
        pair.check(graphs, "identity")
    pair.check(graphs, "identity")
    assert len(graphs) == 1


def test_threads_share_buffers_one_at_a_time(pair: _Pair) -> None:
    graphs = CudaGraphs(_FakeApi())
    wants = {p: _decode(pair.plain, LinkedProgram.run, p) for p in PROGRAMS}
    with ThreadPoolExecutor(len(PROGRAMS)) as threads:
        got = list(threads.map(lambda p: (p, _decode(pair.model, graphs.run, p)), PROGRAMS * 5))
    assert all(torch.equal(logits, wants[p]) for p, logits in got)


def test_each_program_and_batch_is_captured_once_from_one_pool(pair: _Pair) -> None:
    api = _FakeApi()
    graphs = CudaGraphs(api)
    cases = list(itertools.product(PROGRAMS, (3, 2, 1)))  # the slots of three rows serve fewer, too
    for program, batch in cases:
        pair.check(graphs, program, batch)
    assert api.count("pool") == len(set(map(id, api.pools))) == 1
    assert {(r.program, r.batch) for r in graphs.records} == {(pair.model.resolve(p), b) for p, b in cases}
    assert all(r.reason is None and r.pool is api.pools[0] and r.capture_ms >= 0 for r in graphs.records)


def test_a_replay_waits_for_the_last_user_of_the_buffers_and_limit_zero_makes_none(pair: _Pair) -> None:
    api = _FakeApi()
    _decode(pair.model, CudaGraphs(api).run, "identity")
    assert [entry.split()[0] for entry in api.log] == ["pool", "capture", *["wait", "replay"] * 3]
    _decode(pair.model, CudaGraphs(none := _FakeApi(), limit=0).run, "identity")
    assert none.log == ["pool"]


def test_the_least_recently_used_graph_is_dropped_but_none_in_use(pair: _Pair) -> None:
    api = _FakeApi()
    graphs = CudaGraphs(api, limit=2)
    pair.use(graphs, "skip 0")  # capture 0
    pair.use(graphs, "skip 1")  # capture 1
    pair.use(graphs, "skip 0", 10)  # nobody has used graph 1 for ten runs
    pair.use(graphs, "skip 2")
    assert api.log[-3:] == ["capture 2", "synchronize", "reset 1"]
    assert len(graphs) == 2
    before = api.count("capture")
    for program in ("skip 0", "skip 1", "skip 2") * 3:
        pair.check(graphs, program)
    assert api.count("capture") == before and len(graphs) == 2, "a program too many does not make all capture in turns"


def test_a_graph_does_not_keep_slots_that_the_pool_gave_up(pair: _Pair) -> None:
    graphs, identity = CudaGraphs(_FakeApi(keep=False)), Program.identity(DEPTH)
    with pair.model.session(identity, 1) as session:
        _step(pair.model, graphs.run, identity, session, torch.tensor([5]))
        slot = weakref.ref(session.slots[0][0].untyped_storage())
    with pair.model.session(identity, 2):  # the slots of one row are too small
        del session
    gc.collect()
    assert len(graphs) == 1
    assert slot() is None


def test_a_graph_keeps_its_linked_program(pair: _Pair) -> None:
    """Or another one might get its id, and run this one's code."""
    graphs, made = CudaGraphs(_FakeApi(keep=False)), []

    def run(linked: LinkedProgram, *args: Any) -> Tensor:
        copy = replace(linked)  # nobody else holds this one
        made.append(id(copy))
        return graphs.run(copy, *args)

    _decode(pair.model, run, "identity")
    assert len(set(made)) == len(graphs) == 4, "linked anew, captured anew"
    gc.collect()
    assert set(made) <= {id(o) for o in gc.get_objects() if type(o) is LinkedProgram}


def test_a_failed_capture_falls_back_and_says_why_once(pair: _Pair, caplog: pytest.LogCaptureFixture) -> None:
    api = _FakeApi(fails=lambda number: number == 1)
    graphs = CudaGraphs(api)
    pair.check(graphs, "identity")
    try:
        raise ValueError("being handled by the caller, and no reason")
    except ValueError:
        for _ in range(2):
            pair.check(graphs, "skip 1")  # the failed capture ran half of it
    assert api.log[-2:] == ["capture 1", "synchronize"], "not tried again"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "operation not permitted when stream is capturing" in caplog.text
    assert graphs.records[-1].reason == "RuntimeError: operation not permitted when stream is capturing"
    pair.check(graphs, "skip 1", batch=2)  # another batch is tried
    assert [r.reason is None for r in graphs.records] == [True, False, True]


def test_nothing_is_tried_for_ever_where_no_capture_works(pair: _Pair, caplog: pytest.LogCaptureFixture) -> None:
    api = _FakeApi(fails=lambda number: True)
    graphs = CudaGraphs(api)
    for program in (*PROGRAMS, "skip 2", "skip 3"):
        pair.check(graphs, program)
    assert api.count("capture") == len(graphs.records) == 3
    assert "none is tried any more" in caplog.text


def test_errors_that_are_no_failed_capture_come_through(pair: _Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    api = _FakeApi()
    monkeypatch.setattr(api, "capture", lambda pool, function: {}["a mistake in our code"])
    with pytest.raises(KeyError, match="mistake"):
        pair.use(CudaGraphs(api), "identity")


# --------------------------------------------------------------------------------------------------- the real thing

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures real CUDA graphs: needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def gpu(plain: CompiledModel) -> _Pair:
    """Inductor regions on the GPU, against eager ones on the CPU."""
    return _Pair(compile(make("llama").to("cuda"), "inductor", max_length=31, cache=False), plain, 1e-3)  # type: ignore[arg-type]


def _real(limit: int = 128) -> CudaGraphs:
    return CudaGraphs(CudaApi(torch.device("cuda", torch.cuda.current_device())), limit)


def _all_captured(graphs: CudaGraphs) -> bool:
    return bool(graphs.records) and all(r.reason is None for r in graphs.records)


@needs_cuda
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_cuda_decodes_equal_eager_ones(gpu: _Pair, program: str, batch: int) -> None:
    graphs = _real()
    for _ in range(2):
        gpu.check(graphs, program, batch)
    assert _all_captured(graphs)


@needs_cuda
def test_cuda_programs_capture_fast_and_share_memory(gpu: _Pair) -> None:
    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    graphs, pick = _real(), random.Random(0)
    _decode(gpu.model, graphs.run, "repeat 0-3 x2")  # allocates slots, workspace and what the longest program needs
    before = reserved()
    while len(graphs) < 101:
        path = tuple(pick.randrange(DEPTH) for _ in range(pick.randint(1, 8)))
        _decode(gpu.model, graphs.run, Program.from_path(path, DEPTH), num_tokens=2)
    grown = reserved() - before
    assert _all_captured(graphs)
    times = sorted(r.capture_ms for r in graphs.records[1:])
    print(f"100 programs: median {statistics.median(times):.1f}, slowest {times[-1]:.1f} ms to capture; {grown >> 10} KiB more")
    assert grown <= 8 << 20, "graphs leave nothing in the pool"


@needs_cuda
def test_cuda_graphs_outlive_those_that_are_dropped(gpu: _Pair) -> None:
    """Resetting a graph drops the cuBLAS workspace that others were captured with."""
    graphs, longest = _real(limit=2), "repeat 0-3 x2"
    want = _decode(gpu.plain, LinkedProgram.run, longest, num_tokens=20)
    steps = _steps(gpu.model, graphs.run, longest, num_tokens=20)  # one session, so that its graph stays in use
    for i, program in enumerate(p for p in PROGRAMS for _ in range(3)):
        torch.testing.assert_close(next(steps).cpu(), want[i], rtol=0, atol=gpu.tolerance)
        gpu.check(graphs, program)
        torch.cuda.empty_cache()
    steps.close()
    assert len(graphs) == 2 and len(graphs.records) > 3, "some were dropped"
    assert _all_captured(graphs)
    assert sum(r.program == gpu.model.resolve(longest) for r in graphs.records) == 1


@needs_cuda
def test_cuda_replays_on_several_streams_keep_out_of_each_others_way(gpu: _Pair) -> None:
    graphs, streams = _real(), [torch.cuda.Stream() for _ in PROGRAMS]
    wants = [_decode(gpu.plain, LinkedProgram.run, p, num_tokens=12) for p in PROGRAMS]
    for program in PROGRAMS:
        _decode(gpu.model, LinkedProgram.run, program)  # compiles
    sessions = [_steps(gpu.model, graphs.run, p, num_tokens=12) for p in PROGRAMS]
    got: list[list[Tensor]] = [[] for _ in PROGRAMS]
    torch.cuda.synchronize()
    for _, i in itertools.product(range(12), range(len(PROGRAMS))):
        with torch.cuda.stream(streams[i]):
            got[i].append(next(sessions[i]))
    torch.cuda.synchronize()
    for session, logits, want in zip(sessions, got, wants, strict=True):
        session.close()
        torch.testing.assert_close(torch.stack(logits).cpu(), want, rtol=0, atol=gpu.tolerance)
    assert _all_captured(graphs)


@needs_cuda
def test_cuda_capture_that_fails_leaves_all_in_order(gpu: _Pair) -> None:
    graphs, stream = _real(), torch.cuda.current_stream()
    spoiled: list[LinkedProgram] = []

    def run(linked: LinkedProgram, *args: Any) -> Tensor:
        head = linked.epilogue
        assert head is not None

        def synchronizing(operands: list[Tensor]) -> Any:
            logits = head.region(operands)
            assert logits[0].sum().item() != 0  # what a capture forbids
            return logits

        spoiled.append(replace(linked, epilogue=replace(head, region=synchronizing)))
        return graphs.run(spoiled[0], *args)

    got, want = _decode(gpu.model, run, "skip 1"), _decode(gpu.plain, LinkedProgram.run, "skip 1")
    torch.testing.assert_close(got, want, rtol=0, atol=gpu.tolerance)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert len(graphs.records) == 1 and "captur" in (graphs.records[0].reason or "")
    gpu.check(graphs, "identity")
    assert graphs.records[-1].reason is None, "the next capture works"
