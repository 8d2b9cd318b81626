"""A bundle of a model whose layers keep several pairs of keys and values: in Python and in C++."""

from pathlib import Path

import pytest
import torch

from cpp_runner import comma, cpp_tokens, python_tokens
from polar_fx.bundle import export, load_bundle
from several_attentions import double_compiled_to_files, double_logits, make_double
from tiny_models import prompts

PROGRAMS = ("identity", "0 (1)*2@0.5 0")


@pytest.mark.slow
def test_programs_run_as_a_plain_loop_and_in_cpp(runner: Path, tmp_path: Path) -> None:
    """Prompts of several parts, and decoded tokens."""
    folder, source = tmp_path / "bundle", make_double(2)
    export(double_compiled_to_files(), folder, PROGRAMS)
    loaded = load_bundle(folder)
    for text, row in zip(PROGRAMS, prompts(20, 9), strict=True):
        program = loaded.resolve(text)
        want = double_logits(source, program, row=row)
        logits = loaded.forward(row[None], program=program)[0]
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
        arguments = ("--tokens", comma(row.tolist()), "--new", 8, "--program", str(program))
        got = cpp_tokens(runner, folder, *arguments)
        assert got == python_tokens(loaded, text, prompt=row.tolist(), new=8)
