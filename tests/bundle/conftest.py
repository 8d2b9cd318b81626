"""The C++ runner, for tests of bundles."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from places import ROOT

SOURCES = ROOT / "polar_fx" / "bundle" / "cpp"


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built once."""
    if sys.platform != "linux":
        pytest.skip("the runner is for Linux")
    if shutil.which("cmake") is None or not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        pytest.skip("building the runner needs cmake and a C++ compiler")
    place = tmp_path_factory.mktemp("runner")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configure = ["cmake", *ninja, "-S", str(SOURCES), "-B", str(place), prefix]
    for command in (configure, ["cmake", "--build", str(place)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return place / "polar_run"
