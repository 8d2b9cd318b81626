"""Regions as exported graphs in the place of machine code: no compiler, and any machine runs them.

For tests in which the compiler is not the subject.
"""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from polar_fx.backends import AotInductorBackend, EagerBackend, Region
from polar_fx.backends.aot_inductor import GRAPH, REGION
from polar_fx.backends.specialize import graph_of


def use_graphs(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let `aot_inductor` keep each region's exported graph, and interpret it after its passes.

    `cache` becomes the user's cache folder: these graphs have the keys of machine code, and must
    not be found by tests that want that.
    """

    def build(self: AotInductorBackend, folder: Path) -> None:
        shutil.copy(folder / GRAPH, folder / REGION)
        # a file of its own, not the same bytes twice
        with zipfile.ZipFile(folder / REGION, "a") as archive:
            archive.writestr("graph/extra/region", "")

    def load(self: AotInductorBackend, files: Mapping[str, Path]) -> Region:
        exported = torch.export.load(files[REGION])
        return EagerBackend().compile_region(graph_of(exported, self.passes), [], [])

    patch.setenv("POLAR_FX_CACHE_DIR", str(cache))
    patch.setattr(AotInductorBackend, "in_workers", False)  # other processes would compile
    patch.setattr(AotInductorBackend, "build", build)
    patch.setattr(AotInductorBackend, "load", load)
