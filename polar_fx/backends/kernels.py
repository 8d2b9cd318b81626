"""Operators that Inductor is taught for the CPU: kernels of ours, which it compiles into the
regions that call them, and a call of a library.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from . import (
    block_attention,
    grouped_kernel,
    linear_source,
    onednn_linear,
    quantized_kernel,
    row_kernel,
)

# By operator: how Inductor is taught it, and the text of its kernel if it has one
_KNOWN: dict[Any, tuple[Callable[[], None], str | None]] = {
    onednn_linear.ONEDNN_LINEAR: (onednn_linear.register, None),
    row_kernel.ROW_LINEAR: (row_kernel.register, linear_source.SOURCE + row_kernel.KERNEL),
    quantized_kernel.QUANTIZED_LINEAR: (
        quantized_kernel.register,
        linear_source.SOURCE + quantized_kernel.SOURCE + quantized_kernel.KERNEL,
    ),
    grouped_kernel.GROUPED_LINEAR: (
        grouped_kernel.register,
        linear_source.SOURCE + grouped_kernel.SOURCE + grouped_kernel.KERNEL,
    ),
    block_attention.BLOCK_ATTENTION: (
        block_attention.register,
        block_attention.SOURCE + block_attention.KERNEL,
    ),
}


def kernel_options(graph_module: GraphModule) -> dict[str, Any]:
    """The options to compile a graph with, for the sake of the kernels it calls; none if it calls
    none. Inductor knows all operators of the graph after this.

    Inductor finds code again by its options: the kernels' own text is among them, as metadata.
    """
    texts: dict[str, str] = {}
    for target, (_, text) in _KNOWN.items():
        if not graph_module.graph.find_nodes(op="call_function", target=target):
            continue
        _register(target)
        if text is not None:
            texts[target._opname] = hashlib.sha256(text.encode()).hexdigest()
    # the kernels take nothing in that follows them
    return {"epilogue_fusion": False, "aot_inductor.metadata": texts} if texts else {}


@functools.cache
def _register(target: Any) -> None:
    _KNOWN[target][0]()
