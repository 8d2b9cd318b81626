"""A second process, or a second model of the same make, starts from the artifact store: it traces
and compiles nothing.

Shape legend: B batch, T tokens, V vocabulary.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from places import child_environment
from polar_fx.backends import (
    AotInductorBackend,
    Region,
    RegionName,
    ShapeClass,
)
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import CaptureError, CompileError
from polar_fx.passes.pipeline import PassRecord
from polar_fx.program import Program
from polar_fx.store import ArtifactStore
from stored_models import (
    LENGTH,
    PROGRAM,
    GraphBackend,
    answer_of,
    compile_for,
    eager_model,
    kinds_in,
    reopened,
    sources_of,
)
from tiny_models import make, prompts


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("warm") / "artifacts", limit_bytes=0)


@pytest.fixture(scope="module")
def first(store: ArtifactStore) -> CompiledModel:
    compiled = compile_for(make("llama"), store, workers=2)
    answer_of(compiled)
    return compiled


@pytest.fixture
def copied(store: ArtifactStore, first: CompiledModel, tmp_path: Path) -> ArtifactStore:
    """A warm store of one's own, to damage."""
    shutil.copytree(store.root, tmp_path / "artifacts")
    return ArtifactStore(tmp_path / "artifacts", limit_bytes=0)


# ------------------------------------------------------------------------------ cold, and then warm


def test_the_first_start_traces_the_model_and_compiles_six_regions(
    first: CompiledModel, store: ArtifactStore
) -> None:
    # prologue and layer for a prompt and for one token, the layer's keys and values for a prompt's
    # last step, the head for one token
    wanted = {
        ("prologue", "T=2+"),
        ("layer_kind_0", "T=2+"),
        ("layer_kind_0.kv", "T=2+"),
        ("prologue", "T=1"),
        ("layer_kind_0", "T=1"),
        ("epilogue", "T=1"),
    }
    assert {(r.body, r.shapes.split()[1]) for r in first.compilations} == wanted and len(
        first.compilations
    ) == 6
    assert all(r.seconds > 0 and r.num_bytes > 0 for r in first.compilations)
    assert (
        first.library.is_traced
        and kinds_in(store) == ["capture", *["region"] * 6]
        and store.verify() == []
    )


def test_compiled_code_agrees_with_the_interpreter(first: CompiledModel) -> None:
    """Last tokens by compiled regions against every token by eager ones: logits, keys and values,
    and what comes next.
    """
    eager = compile_for(make("llama"), False, backend="eager")
    program, rows = first.resolve(PROGRAM), prompts(9)
    with (
        torch.no_grad(),
        first.session(program, 1) as mine,
        eager.session(program, 1) as theirs,
    ):
        got, want = (
            first.prefill(program, mine, rows)[0],
            eager.prefill(program, theirs, rows, every=True)[0][-1],
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        for one, two in zip(_held(mine), _held(theirs), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        token = torch.tensor([5])
        torch.testing.assert_close(
            first.decode(program, mine, token),
            eager.decode(program, theirs, token),
            rtol=0,
            atol=1e-4,
        )


def _held(session: Any) -> list[Tensor]:
    """Keys and values of one row's first block, a step after another."""
    (row,) = session.rows.rows
    return [
        tensor[int(row.table[step, 0])]
        for step, layer in enumerate(row.program.path)
        for tensor in row.store.tensors(row.specs[layer])
    ]


def test_a_second_start_traces_and_compiles_nothing_and_gives_the_same_bits(
    first: CompiledModel, store: ArtifactStore
) -> None:
    second = compile_for(make("llama"), reopened(store))
    assert torch.equal(answer_of(second), answer_of(first))
    assert (
        not second.library.is_traced
        and second.compilations == ()
        and sources_of(second) == ["loaded"] * 6
    )
    assert second.library.fingerprint == first.library.fingerprint


def test_a_hundred_programs_need_nothing_more(first: CompiledModel, store: ArtifactStore) -> None:
    warm = compile_for(make("llama"), reopened(store))
    pick = random.Random(0)
    for _ in range(100):
        path = tuple(pick.randrange(4) for _ in range(pick.randint(1, 8)))
        answer_of(warm, str(Program.from_path(path, 4)), tokens=pick.randint(1, 20))
    assert (
        not warm.library.is_traced
        and sources_of(warm) == ["loaded"] * 6
        and len(store.entries()) == 7
    )


def test_a_fresh_process_traces_and_compiles_nothing_and_gives_the_same_bits(
    first: CompiledModel, store: ArtifactStore
) -> None:
    run = f"t.in_another_process({str(store.root)!r})"
    code = (
        f"import torch, stored_models as t; torch.set_num_threads({torch.get_num_threads()}); {run}"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    answer = hashlib.sha256(answer_of(first).numpy().tobytes()).hexdigest()
    assert json.loads(other.stdout.splitlines()[-1]) == [answer, False, ["loaded"] * 6]


def test_weights_are_no_part_of_what_is_stored(first: CompiledModel, store: ArtifactStore) -> None:
    """Another model of the same make: everything is there already, and the answers are its own."""
    model = make("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(3)
    warm = compile_for(model, reopened(store))
    answer = answer_of(warm)
    assert not warm.library.is_traced and warm.compilations == ()
    assert not torch.allclose(answer, answer_of(first), atol=1e-3)
    torch.testing.assert_close(
        answer, answer_of(compile_for(model, False, backend="eager")), rtol=0, atol=1e-4
    )


# --------------------------------------------------------------------------------- what is not warm


def _is_stored(compiled: CompiledModel, name: str = "layer_kind_0") -> bool:
    shape = ShapeClass.of(1, 1, None)
    return compiled.regions.files(RegionName(name, shape)) is not None


def test_another_length_runs_the_same_regions(first: CompiledModel, store: ArtifactStore) -> None:
    longer = compile_for(make("llama"), reopened(store), max_length=127)
    assert torch.equal(answer_of(longer), answer_of(first))
    assert not longer.library.is_traced and longer.compilations == ()


OTHER_MODELS = {
    "another architecture": lambda: make("gemma2"),
    "another dtype": lambda: make("llama").bfloat16(),
    "another size": lambda: make("llama", intermediate_size=48),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_find_neither_capture_nor_regions(
    name: str, first: CompiledModel, copied: ArtifactStore
) -> None:
    other = compile_for(OTHER_MODELS[name](), copied)
    assert other.library.is_traced and not _is_stored(other)
    assert kinds_in(copied) == ["capture", "capture", *["region"] * 6]


def test_a_deeper_model_of_equal_layers_is_traced_but_shares_the_regions(
    first: CompiledModel, copied: ArtifactStore
) -> None:
    deeper = compile_for(make("llama", num_hidden_layers=5), copied)
    answer_of(deeper, "identity")
    assert deeper.library.is_traced and deeper.compilations == ()


OTHER_BACKENDS = {
    "options": AotInductorBackend({"max_autotune": False}),
    "passes": AotInductorBackend(passes=()),
}


@pytest.mark.parametrize("name", OTHER_BACKENDS)
def test_another_backend_is_another_region(
    name: str, first: CompiledModel, store: ArtifactStore
) -> None:
    assert not _is_stored(compile_for(make("llama"), reopened(store), backend=OTHER_BACKENDS[name]))


# ----------------------------------------------------------------------------------- how it is made


@pytest.mark.slow
def test_workers_and_this_process_compile_the_same(first: CompiledModel, tmp_path: Path) -> None:
    """Of one token only, so that three regions do: the fixture's were made by two workers."""
    alone = compile_for(
        make("llama"), ArtifactStore(tmp_path / "artifacts", limit_bytes=0), workers=0
    )
    assert torch.equal(answer_of(alone, tokens=1), answer_of(first, tokens=1))
    assert [r.body for r in alone.compilations] == ["prologue", "layer_kind_0", "epilogue"]
    by_workers = {(r.body, r.shapes): r for r in first.compilations}
    for region in alone.compilations:
        theirs = by_workers[region.body, region.shapes].passes
        assert _done(theirs) == _done(region.passes), "what passes did comes back from workers"
    assert ("linear-to-row-kernel", True, {"linears rewritten": 7, "calls": 4}) in _done(
        alone.compilations[1].passes
    )


def _done(records: Iterable[PassRecord]) -> list[tuple[str, bool, dict[str, int | str]]]:
    """What passes did, without how long it took."""
    return [(r.name, r.modified, r.counts) for r in records]


BROKEN = AotInductorBackend({"no_such_option": 1})


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_cannot_be_compiled_is_an_error_that_names_the_reason(
    workers: int, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "artifacts", limit_bytes=0)
    compiled = compile_for(make("llama"), store, backend=BROKEN, workers=workers)
    with pytest.raises(CompileError, match="no_such_option"):
        answer_of(compiled)
    assert (
        kinds_in(store) == ["capture"]
        and store.verify() == []
        and not list((store.root / "tmp").iterdir())
    )
    assert len(list(store.root.glob("objects/*/*"))) == 1, "the symbol table"
    assert compiled.compilations == ()
    with pytest.raises(CompileError, match="no_such_option"):
        answer_of(compiled)


def test_a_damaged_region_is_refused_and_made_again(
    first: CompiledModel, copied: ArtifactStore
) -> None:
    name = RegionName("layer_kind_0", ShapeClass.of(1, 1, None))
    files = compile_for(make("llama"), copied).regions.files(name)
    assert files is not None
    with files["region.pt2"].open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    mended = compile_for(make("llama"), copied)
    assert torch.equal(answer_of(mended), answer_of(first))
    assert [r.body for r in mended.compilations] == ["layer_kind_0"] and len(copied.refusals) == 1
    assert "region.pt2 is not what was stored" in copied.refusals[0].reason
    assert (
        copied.verify() == []
        and sources_of(_answered(compile_for(make("llama"), copied))) == ["loaded"] * 6
    )


def _answered(compiled: CompiledModel) -> CompiledModel:
    answer_of(compiled)
    return compiled


# ----------------------------------------------------------------- a backend whose files are graphs


@pytest.mark.slow
def test_without_a_store_every_process_compiles_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        backend = GraphBackend()
        compiled = compile_for(make("llama"), False, backend=backend)
        torch.testing.assert_close(answer_of(compiled), answer_of(eager_model()), rtol=0, atol=1e-4)
        assert len(backend.built) == len(compiled.compilations) == 6
        assert not any(folder.exists() for folder in backend.built), "nothing is left behind"
    assert not list(tmp_path.iterdir())


def test_the_users_cache_is_the_store_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path / "cache"))
    compiled = compile(make("llama"), GraphBackend(), max_length=LENGTH)
    answer_of(compiled)
    assert (
        kinds_in(ArtifactStore()) == ["capture", *["region"] * 6]
        and ArtifactStore().root == tmp_path / "cache" / "artifacts"
    )
    backend = GraphBackend()
    warm = compile(make("llama"), backend, max_length=LENGTH)
    assert torch.equal(answer_of(warm), answer_of(compiled)) and (
        backend.built,
        backend.loaded,
    ) == (
        [],
        6,
    )
    assert not warm.library.is_traced


def test_a_region_that_is_gone_is_made_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts", limit_bytes=0)
    compiled = compile_for(make("llama"), store, backend=GraphBackend())
    want = answer_of(compiled)
    store.clear()
    assert torch.equal(answer_of(compiled), want), "what is loaded needs no store"
    backend = GraphBackend()
    assert (
        torch.equal(answer_of(compile_for(make("llama"), store, backend=backend)), want)
        and len(backend.built) == 6
    )


def test_two_models_of_one_make_in_one_process_compile_once(tmp_path: Path) -> None:
    store, backends = (
        ArtifactStore(tmp_path / "artifacts", limit_bytes=0),
        (GraphBackend(), GraphBackend()),
    )
    models = [compile_for(make("llama"), store, backend=b) for b in backends]
    assert torch.equal(*(answer_of(m) for m in models))
    assert [len(b.built) for b in backends] == [6, 0]
    assert [m.library.is_traced for m in models] == [True, False]


class _Transposed(GraphBackend):
    """Hands on every side value of two axes or more in another layout: same numbers, other
    strides.
    """

    def load(self, files: Mapping[str, Path]) -> Region:
        region = super().load(files)

        def run(operands: list[Tensor]) -> Sequence[Tensor]:
            return [r.mT.contiguous().mT if r.dim() > 1 else r for r in region(operands)]

        return run


def test_a_prologue_that_hands_on_another_layout_is_refused_every_time(tmp_path: Path) -> None:
    """Compiled code reads its operands by the strides it was compiled for."""
    store = ArtifactStore(tmp_path / "artifacts", limit_bytes=0)
    for _ in range(2):
        with pytest.raises(
            CaptureError,
            match=r"the compiled prologue hands on .* where .* reads strides .*backend='eager'",
        ):
            answer_of(compile_for(make("llama"), store, backend=_Transposed()))
    assert kinds_in(store) == ["capture"], "what was refused must not be there for the next process"
