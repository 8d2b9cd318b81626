"""Why code is compiled although there is some for the same graph."""

import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from polar_fx.backends import EagerBackend, ShapeClass
from polar_fx.backends.base import RegionName
from polar_fx.output.waiting import LOGGER
from polar_fx.runtime.code_key import VariantKey
from polar_fx.runtime.compiled_before import why_again
from polar_fx.runtime.regions import RegionTable
from polar_fx.store import ArtifactStore, Entry
from stored_models import GraphBackend, compile_for
from tiny_models import make

KEY = replace(
    VariantKey.of(
        "region",
        "a graph",
        shape=ShapeClass(1, 1, 272),
        backend=EagerBackend(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    ),
    threads=2,
    torch_version="2.13.0 abc",
)


def entry(**changed: str | int) -> Entry:
    now = datetime.now(UTC)
    return Entry("key", {**KEY.facts(), **changed}, {}, now, now)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"threads": 1}, "for 1 compute thread(s) (now 2)"),
        ({"bucket": "B=1 T=1 L=1040"}, "for rows of up to 1040 tokens (now up to 272 tokens)"),
        ({"bucket": "B=1 T=1 L=any"}, "for rows of any length (now up to 272 tokens)"),
        (
            {"bucket": "B=1 T=1 L=any", "passes": "y"},  # which follow from the shapes
            "for rows of any length (now up to 272 tokens)",
        ),
        (
            {"bucket": "B=2+ T=1 L=any"},
            "for several rows of any length (now one row of up to 272 tokens)",
        ),
        ({"bucket": "B=2+ T=1 L=272"}, "for several rows (now one row)"),
        ({"dtype": "bfloat16"}, "for dtype bfloat16 (now float32)"),
        ({"torch_version": "2.12.0 abc"}, "by torch 2.12.0 (now 2.13.0)"),
        ({"target": "x"}, "for another processor"),
        ({"builder": "x", "passes": "y"}, "by another version of polar_fx's compiler"),
    ],
)
def test_what_differs_is_named(changed: dict[str, str | int], reason: str) -> None:
    assert why_again([KEY], [entry(**changed)]) == f"what is on disk is {reason}"


def test_code_of_other_calls_or_graphs_is_no_reason() -> None:
    others = [entry(bucket="B=1 T=2+ L=272"), entry(graph="other", threads=1), entry(bucket="?")]
    assert why_again([KEY], others) == ""


def test_the_most_similar_code_is_compared() -> None:
    assert why_again([KEY], [entry(threads=1, target="x"), entry(target="x")]) == (
        "what is on disk is for another processor"
    )


def test_a_first_and_a_second_compilation_tell_what_they_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    store, backend = ArtifactStore(tmp_path / "artifacts"), GraphBackend()
    compiled = compile_for(make("llama"), store, backend=backend)
    name = RegionName(compiled.library.epilogue.target, ShapeClass(1, 1, compiled.pool.length))
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        RegionTable(compiled.library, backend, max_length=64, store=store).one(name)
    assert caplog.messages == [
        "compiling 1 region",
        "compiling 1 region: what is on disk is for 1 compute thread(s) (now 3)",
    ]
