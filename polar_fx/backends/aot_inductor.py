"""AOTInductor regions: a shared library per body and shape class, on disk, called without Python
between kernels.

The adapter around torch's semi-public `aot_compile`, `package_aoti` and package loader; nothing
else in the project touches them.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader  # type: ignore[import-not-found]
from torch._inductor.package import package_aoti
from torch.fx import GraphModule

from ..passes.base import Pass
from .base import Dynamic, PersistentBackend, Region
from .inductor import REGION_PASSES
from .light_headers import light_headers
from .specialize import compiler_options, example_values, graph_of, load_graph, save, specialize
from .stack_arrays import stack_arrays

GRAPH, REGION = "graph.pt2", "region.pt2"


class AotInductorBackend(PersistentBackend):
    """Each body compiled ahead of time, once per shape class; weights and KV slots are operands, so
    layers share the code.
    """

    name: ClassVar[str] = "aot_inductor"
    needs_shapes: ClassVar[bool] = True

    def __init__(
        self, options: Mapping[str, Any] | None = None, passes: Sequence[Pass] = REGION_PASSES
    ) -> None:
        super().__init__(options, passes)

    def export(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic, folder: Path
    ) -> None:
        save(specialize(body, example, dynamic=dynamic), folder / GRAPH)

    def build(self, folder: Path) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals
            graph_module = graph_of(load_graph(folder / GRAPH), self.passes)
            options = {"aot_inductor.package": True, **compiler_options(graph_module, self.options)}
            operands = tuple(example_values(graph_module))
            with light_headers(), stack_arrays(graph_module, options):
                files: Any = torch._inductor.aot_compile(graph_module, operands, options=options)
            package_aoti(str(folder / REGION), files)

    def load(self, files: Mapping[str, Path]) -> Region:
        # torch's Python loader would first ask which vector instructions there are by running a
        # compiler; the variant key already says so
        path = str(files[REGION])
        about: Any = AOTIModelPackageLoader.load_metadata_from_package(path, "model")  # type: ignore[attr-defined]
        # On a GPU a package would wait for its own last run before each run, which a graph capture
        # does not allow; streams order runs there. On the CPU the wait is what keeps two threads
        # out of one package.
        single_threaded = about["AOTI_DEVICE_KEY"] != "cpu"
        return AOTIModelPackageLoader(path, "model", single_threaded, 1, -1).boxed_run
