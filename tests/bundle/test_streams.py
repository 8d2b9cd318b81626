"""Bundles of a model whose layers hand on several streams side by side: in Python and in C++."""

from pathlib import Path

import pytest
import torch

from cpp_runner import comma, cpp_tokens, python_tokens
from polar_fx.bundle import export, load_bundle
from streams import streams_compiled_to_files, streams_logits, streams_model
from tiny_models import prompts

PROGRAMS = ("identity", "0 1 (1 3)*2@0.5 2", "0 1")
pytestmark = pytest.mark.slow  # many regions are compiled


def test_programs_run_as_a_plain_loop_and_in_cpp(runner: Path, tmp_path: Path) -> None:
    """Prompts in parts; programs that end in layers that only read, with a damped repeat, and in a
    layer cut to its keys and values.
    """
    export(streams_compiled_to_files(), tmp_path / "bundle", PROGRAMS)
    loaded = load_bundle(tmp_path / "bundle")
    for text, row in zip(PROGRAMS, prompts(20, 9, 3), strict=True):
        program = loaded.resolve(text)
        logits = loaded.forward(row[None], program=program)[0]
        want = streams_logits(streams_model(2), program, row=row)
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
        arguments = ("--tokens", comma(row.tolist()), "--new", 8, "--program", str(program))
        got = cpp_tokens(runner, tmp_path / "bundle", *arguments)
        assert got == python_tokens(loaded, text, prompt=row.tolist(), new=8)
