"""Where things are in a checkout, and the environment of Python processes that tests start."""

import os
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
