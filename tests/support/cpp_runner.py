"""How tests call the C++ runner, and what Python generates from the same bundle."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polar_fx.bundle import BundledModel


def run_cpp(runner: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The finished process, whatever became of it."""
    # nothing of the environment: the program finds torch's libraries itself, and needs no compiler
    env = {"PATH": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [str(runner), *map(str, arguments)], capture_output=True, text=True, check=False, env=env
    )


def cpp_tokens(runner: Path, *arguments: Any) -> list[int]:
    """The new tokens that it prints."""
    done = run_cpp(runner, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("\n") == 1
    return [int(t) for t in done.stdout.split(",")]


def comma(tokens: Sequence[int]) -> str:
    """Tokens as the runner takes them."""
    return ",".join(map(str, tokens))


def python_tokens(bundle: BundledModel, program: str, *, prompt: list[int], new: int) -> list[int]:
    """The new tokens of a prompt, greedily."""
    ids = torch.tensor([prompt])
    return bundle.generate(ids, program=program, max_new_tokens=new, do_sample=False)[
        0, len(prompt) :
    ].tolist()
