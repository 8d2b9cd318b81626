"""Captured decodes of rows in lock-step equal those that are not captured, with a stand-in for CUDA
(on a GPU: test_cuda_graphs_gpu.py).

Shape legend: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from captured_decodes import FakeApi, HostWork
from polar_fx.compiled import CompiledModel, compile
from polar_fx.engine.engine import Engine, EngineSettings
from polar_fx.engine.sampling import Sampling
from polar_fx.passes.address_kv import BLOCK
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.kv_store import Growth
from polar_fx.runtime.lockstep_rows import padded_size
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner
from slow_cases import some_slow
from tiny_models import make, prompts

MIXED = ("identity", "skip 1", "skip 0, repeat 2 x3", "repeat 1-2 x2 @0.5", "skip 2")
FAMILIES = ("llama", "gemma3_text", "qwen2_moe")


def _again(plain: CompiledModel, family: str = "llama") -> CompiledModel:
    """The same, with a store of its own, which has room for what most tests need."""
    regions = RegionTable(plain.library, plain.backend, max_length=127, store=None)
    made = CompiledModel(Runner.of_model(make(family), regions))
    made.runner.lockstep.store.growth = Growth(part=1, least=400)
    return made


def _compiled(family: str) -> CompiledModel:
    return compile(make(family), "eager", max_length=127, cache=False)


@pytest.fixture(scope="module")
def plain() -> CompiledModel:
    return _compiled("llama")


@pytest.fixture
def model(plain: CompiledModel) -> CompiledModel:
    return _again(plain)


def decoded(
    model: CompiledModel, programs: Sequence[str], *, tokens: int = 5, first: int = 3
) -> Tensor:
    """Logits [tokens, B, V] after ragged prompts."""
    runner = model.runner
    chosen = [model.resolve(program) for program in programs]
    lengths = [first + 2 * row for row in range(len(chosen))]
    found = []
    with runner.open_together(chosen) as session:
        runner.prefill(session, prompts(*lengths))
        for number in range(tokens):
            token = (torch.arange(len(chosen)) + 7 * number + 3) % 100
            found.append(runner.decode(session, token))
    return torch.stack(found)


@pytest.mark.parametrize("family", some_slow(FAMILIES, ("gemma3_text",)))
def test_captured_rows_get_what_they_get_uncaptured(family: str) -> None:
    plain, api = _compiled(family), FakeApi()
    model = _again(plain, family)
    model.graphs = CudaGraphs(api)
    for programs in (MIXED, MIXED[:2], ["identity"] * 3, ["skip 1"]):
        for _ in range(2):
            torch.testing.assert_close(
                decoded(model, programs), decoded(plain, programs), rtol=0, atol=2e-5
            )
    assert all(record.reason is None for record in model.graphs.records)
    assert api.count("replay") >= 2 * 4 * 5 - len(model.graphs.records)


def test_one_capture_serves_any_rows_of_an_order_of_layers(
    plain: CompiledModel, model: CompiledModel
) -> None:
    api = FakeApi()
    model.graphs = CudaGraphs(api)
    decoded(model, ["identity", "skip 1", "skip 2"])
    assert api.count("capture") == 1
    for programs in (["skip 1", "identity", "skip 1"], ["skip 2", "identity", "skip 1", "skip 0"]):
        want = decoded(plain, programs)
        torch.testing.assert_close(decoded(model, programs), want, rtol=0, atol=2e-5)
    assert api.count("capture") == 1, "three or four rows, whose layers are those of the model"


def test_rows_that_grow_and_a_store_that_moves_are_captured_anew(
    plain: CompiledModel, model: CompiledModel
) -> None:
    api = FakeApi()
    model.graphs = CudaGraphs(api)
    programs = ["identity", "skip 1"]
    model.runner.lockstep.store.growth = Growth(part=1, least=100)
    got = decoded(model, programs, tokens=3 * BLOCK, first=BLOCK)
    torch.testing.assert_close(
        got, decoded(plain, programs, tokens=3 * BLOCK, first=BLOCK), rtol=0, atol=2e-5
    )
    before = len(model.graphs)
    with model.runner.open_together([model.resolve("identity")] * 9) as session:
        model.runner.prefill(session, prompts(*[70] * 9))  # more than has room there
        got = model.runner.decode(session, torch.full((9,), 5))
    assert len(model.graphs) == 1 < before, "graphs of where the store was are gone"
    assert got.isfinite().all()


def test_a_nan_of_a_row_stays_in_it(plain: CompiledModel) -> None:
    """Also where it takes no part in a call, and writes to the block of such rows."""
    hf: Any = make("llama")
    model = compile(hf, "eager", max_length=127, cache=False)
    with torch.no_grad():
        hf.model.embed_tokens.weight[3] = float("nan")
    model.graphs = CudaGraphs(FakeApi())
    want, got = decoded(plain, ["identity", "skip 1"]), []
    programs = [model.resolve(p) for p in ("identity", "skip 1", "skip 2")]
    with model.runner.open_together(programs) as session:
        rows = [*prompts(3, 5), torch.tensor([3, 3])]
        model.runner.prefill(session, rows)
        for number in range(5):
            token = (torch.arange(2) + 7 * number + 3 + (number == 0)) % 100
            got.append(model.runner.decode(session, torch.cat((token, torch.tensor([3])))))
    assert torch.stack(got)[:, 2].isnan().all()
    assert torch.stack(got)[:, :2].isfinite().all() and want.shape[1] == 2


def test_a_decoded_token_neither_copies_from_the_host_nor_waits(model: CompiledModel) -> None:
    model.graphs = CudaGraphs(FakeApi(keep=False))
    programs = [model.resolve(program) for program in ("identity", "skip 1")]
    token = torch.tensor([5, 6])
    with model.runner.open_together(programs) as session:
        model.runner.prefill(session, prompts(3, 5))
        model.runner.decode(session, token)
        with HostWork() as seen:
            for _ in range(3):
                model.runner.decode(session, token)
        assert session.lengths == [7, 9]
        assert session.rows.positions.flatten().tolist() == [7, 9], "the device counts along"
    assert seen.found == []


def test_the_end_of_a_ragged_prompt_is_no_decode(model: CompiledModel) -> None:
    """One row has a token left and the other none: nothing may be written for that one."""
    model.graphs = CudaGraphs(FakeApi())
    runner = model.runner
    runner.prefill_chunk = BLOCK
    with runner.open_together([model.resolve("identity")] * 2) as session:
        runner.prefill(session, prompts(BLOCK + 1, BLOCK))
        for spec in set(model.library.table.kv_specs):
            assert not any(part[0].any() for part in runner.lockstep.store.tensors(spec))


def test_what_cannot_be_captured_runs_uncaptured(
    plain: CompiledModel, model: CompiledModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.graphs = CudaGraphs(FakeApi(fails=lambda number: True))
    torch.testing.assert_close(decoded(model, MIXED), decoded(plain, MIXED), rtol=0, atol=2e-5)
    assert "without a CUDA graph" in caplog.text and len(model.graphs) == 0


def test_an_engine_gives_the_tokens_it_gives_uncaptured(
    plain: CompiledModel, model: CompiledModel
) -> None:
    model.graphs, found = CudaGraphs(FakeApi()), []
    for each in (model, plain):
        with Engine(each.runner, settings=EngineSettings(kept_bytes=0)) as engine:
            asked = []
            for row, program in enumerate(MIXED):
                sampling = Sampling(max_new_tokens=4 + row)
                asked.append(engine.add([3 + row, 5, 7], each.resolve(program), sampling))
            found.append([request.result().tokens for request in asked])
    assert found[0] == found[1] and len(model.graphs.records) > 1
    store = model.runner.lockstep.store
    assert store.num_blocks == 0


def test_sizes_are_rounded_up_to_few() -> None:
    for count in range(1, 200):
        size = padded_size(count)
        assert count <= size < 1.5 * count + 1 and padded_size(size) == size
        assert size % 2 == 0 or size == 1
