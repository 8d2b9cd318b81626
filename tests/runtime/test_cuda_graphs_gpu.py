"""CUDA graphs on a GPU: decodes equal those on the CPU, captures are cheap and leave all in order;
skipped elsewhere.
"""

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from captured_decodes import DEPTH, PROGRAMS, Pair, decode, steps
from polar_fx.compiled import CompiledModel, compile
from polar_fx.program import Program
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.graph_api import CudaApi
from polar_fx.runtime.link import LinkedProgram
from tiny_models import make, prompts

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="captures real CUDA graphs: needs an NVIDIA GPU"
)


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=31, cache=False)


@pytest.fixture(scope="module")
def gpu(plain: CompiledModel) -> Pair:
    """Inductor regions on the GPU, against eager ones on the CPU."""
    return Pair(
        compile(make("llama").to("cuda"), "inductor", max_length=31, cache=False), plain, 1e-3
    )  # type: ignore[arg-type]


def _real(limit: int = 128) -> CudaGraphs:
    return CudaGraphs(CudaApi(torch.device("cuda", torch.cuda.current_device())), limit)


def _all_captured(graphs: CudaGraphs) -> bool:
    return bool(graphs.records) and all(r.reason is None for r in graphs.records)


@needs_cuda
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_cuda_decodes_equal_eager_ones(gpu: Pair, program: str, batch: int) -> None:
    graphs = _real()
    for _ in range(2):
        gpu.check(graphs, program, batch=batch)
    assert _all_captured(graphs)


@needs_cuda
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_cuda_prompts_equal_eager_ones_when_replayed(gpu: Pair, program: str, batch: int) -> None:
    graphs = _real()
    kept, gpu.model.graphs = gpu.model.graphs, graphs
    for turn in range(3):
        rows = [torch.arange(6 - i) + 5 * turn for i in range(batch)]
        found = []
        for model in (gpu.model, gpu.plain):
            with model.runner.open_slots(model.resolve(program), batch) as session:
                found.append(torch.stack(model.runner.prefill(session, rows)).cpu())
        torch.testing.assert_close(*found, rtol=0, atol=gpu.tolerance)
    gpu.model.graphs = kept
    assert all(r.reason is None for r in graphs.prompts.records) and len(graphs.prompts) == 1


@needs_cuda
def test_cuda_programs_capture_fast_and_share_memory(gpu: Pair) -> None:
    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    graphs, pick = _real(), random.Random(0)
    kept, gpu.model.graphs = gpu.model.graphs, None  # its prompts are not what is looked at
    # allocates slots, workspace and what the longest program needs
    decode(gpu.model, graphs.run, program="repeat 0-3 x2")
    before = reserved()
    while len(graphs) < 101:
        path = tuple(pick.randrange(DEPTH) for _ in range(pick.randint(1, 8)))
        decode(gpu.model, graphs.run, program=Program.from_path(path, DEPTH), num_tokens=2)
    gpu.model.graphs = kept
    grown = reserved() - before
    assert _all_captured(graphs)
    times = sorted(r.capture_ms for r in graphs.records[1:])
    print(
        f"100 programs: median {statistics.median(times):.1f}, slowest {times[-1]:.1f} ms to "
        f"capture; {grown >> 10} KiB more"
    )
    assert grown <= 8 << 20, "graphs leave nothing in the pool"


@needs_cuda
def test_cuda_graphs_outlive_those_that_are_dropped(gpu: Pair) -> None:
    """Resetting a graph drops the cuBLAS workspace that others were captured with."""
    graphs, longest = _real(limit=2), "repeat 0-3 x2"
    want = decode(gpu.plain, LinkedProgram.run, program=longest, num_tokens=20)
    # one session, so that its graph stays in use
    running = steps(gpu.model, graphs.run, program=longest, num_tokens=20)
    for i, program in enumerate(p for p in PROGRAMS for _ in range(3)):
        torch.testing.assert_close(next(running).cpu(), want[i], rtol=0, atol=gpu.tolerance)
        gpu.check(graphs, program)
        torch.cuda.empty_cache()
    running.close()
    assert len(graphs) == 2 and len(graphs.records) > 3, "some were dropped"
    assert _all_captured(graphs)
    assert sum(r.program == gpu.model.resolve(longest) for r in graphs.records) == 1


@needs_cuda
def test_cuda_replays_on_several_streams_keep_out_of_each_others_way(gpu: Pair) -> None:
    graphs, streams = _real(), [torch.cuda.Stream() for _ in PROGRAMS]
    wants = [decode(gpu.plain, LinkedProgram.run, program=p, num_tokens=12) for p in PROGRAMS]
    for program in PROGRAMS:
        decode(gpu.model, LinkedProgram.run, program=program)  # compiles
    sessions = [steps(gpu.model, graphs.run, program=p, num_tokens=12) for p in PROGRAMS]
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
def test_cuda_capture_that_fails_leaves_all_in_order(gpu: Pair) -> None:
    graphs, stream = _real(), torch.cuda.current_stream()
    spoiled: list[LinkedProgram] = []

    def run(linked: LinkedProgram, *args: Any) -> Tensor:
        head = linked.chain.epilogue
        assert head is not None

        def synchronizing(operands: list[Tensor]) -> Any:
            logits = head.code(operands)
            assert logits[0].sum().item() != 0  # what a capture forbids
            return logits

        chain = replace(linked.chain, epilogue=replace(head, code=synchronizing))
        spoiled.append(replace(linked, chain=chain))
        return graphs.run(spoiled[0], *args)

    got, want = (
        decode(gpu.model, run, program="skip 1"),
        decode(gpu.plain, LinkedProgram.run, program="skip 1"),
    )
    torch.testing.assert_close(got, want, rtol=0, atol=gpu.tolerance)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert len(graphs.records) == 1 and "captur" in (graphs.records[0].reason or "")
    gpu.check(graphs, "identity")
    assert graphs.records[-1].reason is None, "the next capture works"


@needs_cuda
@pytest.mark.parametrize("programs", [PROGRAMS, ["skip 1"] * 3, ["identity"]])
def test_cuda_rows_in_lockstep_equal_eager_ones(gpu: Pair, programs: Sequence[str]) -> None:
    found = []
    for model in (gpu.model, gpu.plain):
        chosen = [model.resolve(program) for program in programs]
        rows = prompts(*range(3, 3 + len(chosen)))
        with model.runner.open_together(chosen) as session:
            logits = [torch.stack(model.runner.prefill(session, rows))]
            for number in range(16):  # the blocks of a row become more on the way
                token = (torch.arange(len(chosen)) + number) % 100
                logits.append(model.runner.decode(session, token))
        found.append(torch.stack(logits).cpu())
    torch.testing.assert_close(*found, rtol=0, atol=gpu.tolerance)
    assert gpu.model.graphs is not None and _all_captured(gpu.model.graphs)
