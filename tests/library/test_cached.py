"""Captures found again by fingerprint: the same table for the same model, and never a table of what
it was before.

Everything here runs on the eager backend: a capture is stored whichever backend runs it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cached_models import Patch, compile_cached, small, traces
from places import child_environment
from polar_fx.library import cached as library_cache
from polar_fx.library.model_facts import model_facts
from polar_fx.store import ArtifactStore
from slow_cases import some_slow
from tiny_models import FAMILIES, make, prompts


@pytest.mark.parametrize(
    "family", some_slow(["llama", "gemma2", "qwen2_moe"], ["gemma2", "qwen2_moe"])
)
def test_a_table_found_again_serves_an_equal_model(
    family: str, store: ArtifactStore, traced_anew: None
) -> None:
    ids = prompts(9)[0][None]
    first, second = (compile_cached(make(family), store) for _ in range(2))
    assert (first.library.is_traced, second.library.is_traced) == (True, False)
    assert second.library.table == first.library.table
    want = first.forward(ids, program="0 (1-2)*2 3")
    assert (
        torch.equal(second.forward(ids, program="0 (1-2)*2 3"), want) and second.library.is_traced
    )
    assert [e.facts["kind"] for e in store.entries()] == ["capture"]


def test_running_a_model_or_a_copy_of_it_changes_nothing(store: ArtifactStore) -> None:
    model = small()
    assert traces(model, store)
    with torch.no_grad():
        model(prompts(5)[0][None])
        model.generate(prompts(5)[0][None], max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        for p in model.parameters():
            p.mul_(1.5)
            p.requires_grad_(False)
    model.train()
    assert not traces(model, store), "weights, gradients and the mode are no part of a capture"
    assert not traces(small(), store)


def test_facts_are_equal_in_every_process() -> None:
    families = ("llama", "gemma2", "gpt2", "qwen2_moe", "phi3")
    code = (
        "import json; from tiny_models import make; from polar_fx.library.model_facts import "
        f"model_facts; print(json.dumps([model_facts(make(f)) for f in {families}]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    assert json.loads(other.stdout.splitlines()[-1]) == [model_facts(make(f)) for f in families]


@pytest.mark.parametrize("family", some_slow(FAMILIES))
def test_every_family_has_a_fingerprint_which_running_leaves_alone(family: str) -> None:
    model = make(family)
    before = model_facts(model)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert model_facts(model) == before == model_facts(make(family))


def test_a_table_is_taken_only_if_it_was_checked_as_is_wanted(store: ArtifactStore) -> None:
    assert traces(small(), store, check=False)
    assert traces(small(), store, check=True), "an unchecked table is not good enough"
    assert not traces(small(), store, check=True) and not traces(small(), store, check=False)


def test_without_a_cache_nothing_is_written_or_read(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        compiled = compile_cached(small(), False)
        compiled.forward(prompts(5)[0][None])
        assert compiled.library.is_traced
    assert not list(tmp_path.iterdir())
    assert (
        compile_cached(small(), True).library.is_traced
        and not compile_cached(small(), True).library.is_traced
    )
    assert len(ArtifactStore(tmp_path / "cache" / "artifacts").entries()) == 1, (
        "and with it something is"
    )


def test_a_damaged_table_is_refused_and_traced_anew(store: ArtifactStore) -> None:
    assert traces(small(), store)
    (table,) = store.root.glob("objects/*/*.json")
    table.write_text(table.read_text().replace('"prologue"', '"epilogue"'))
    assert traces(small(), store) and len(store.refusals) == 1
    assert not traces(small(), store) and store.verify() == []


def test_what_parses_but_is_no_table_is_traced(store: ArtifactStore, monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        library_cache, "_write", lambda folder, table: (folder / "symbols.json").write_text("{}")
    )
    assert traces(small(), store)
    assert traces(small(), store), "of no use, though it is what was stored"


def test_what_a_hub_client_found_out_is_no_fact(monkeypatch: Patch) -> None:
    """It keeps that in globals, which calls of the hub and settings change."""
    before = model_facts(make("llama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils._auth._IS_GOOGLE_COLAB_CHECKED", True)
    monkeypatch.setattr("huggingface_hub.file_download._are_symlinks_supported_in_dir", {"x": True})
    assert model_facts(make("llama")) == before
