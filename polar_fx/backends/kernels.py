"""Kernels of ours for the CPU, which Inductor compiles into the regions that call them."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from . import quantized_kernel, row_kernel

# By operator: how Inductor is taught its kernel, and the kernel's text
_KERNELS: dict[Any, tuple[Callable[[], None], str]] = {
    row_kernel.ROW_LINEAR: (row_kernel.register, row_kernel.SOURCE + row_kernel.KERNEL),
    quantized_kernel.QUANTIZED_LINEAR: (
        quantized_kernel.register,
        row_kernel.SOURCE + quantized_kernel.SOURCE + quantized_kernel.KERNEL,
    ),
}


def kernel_options(graph_module: GraphModule) -> dict[str, Any]:
    """The options to compile a graph with, for the sake of the kernels it calls, which Inductor
    knows after this; none if it calls none.

    Inductor finds code again by its options: the kernels' own text is among them, as metadata.
    """
    texts: dict[str, str] = {}
    for target, (_, text) in _KERNELS.items():
        if graph_module.graph.find_nodes(op="call_function", target=target):
            _register(target)
            texts[target._opname] = hashlib.sha256(text.encode()).hexdigest()
    # the kernels take nothing in that follows them
    return {"epilogue_fusion": False, "aot_inductor.metadata": texts} if texts else {}


@functools.cache
def _register(target: Any) -> None:
    _KERNELS[target][0]()
