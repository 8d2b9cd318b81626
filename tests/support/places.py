"""Where things are in a checkout, and the environment of Python processes that tests start."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"


def child_environment(hash_seed: str = "7") -> dict[str, str]:
    """Environment variables of a child process that finds polar_fx and the modules in support/."""
    return {
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS / "support")]),
        "PATH": "",
    }


def printed_in_processes(code: str, folder: Path) -> set[str]:
    """What Python code prints in two processes that hash differently, started in `folder`."""
    return {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env=child_environment(seed),
        ).stdout
        for seed in ("1", "2")
    }
