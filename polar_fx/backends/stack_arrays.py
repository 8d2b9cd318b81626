"""What lies between the kernels of a region, as arrays on the CPU's stack where sizes are known:
decoding one row, a layer would otherwise make some fifty tensors and views of them at every call, a
quarter of the time that a small layer takes.

The adapter around Inductor's wrapper that can do so; nothing else in the project touches it.
"""

import dataclasses
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

_OPTIONS = {
    "aot_inductor.allow_stack_allocation": True,
    # A result must not take over an array: see `_wrapper`.
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
}
_lock = threading.Lock()


@contextmanager
def stack_arrays(graph_module: GraphModule) -> Iterator[dict[str, Any]]:
    """Options to compile a graph with, within it; none if it is not on the CPU, or the sizes of its
    results may vary. Inductor itself leaves out graphs that need much memory or call the library.
    """
    if not _is_known(graph_module):
        yield {}
        return
    from torch._inductor.codegen.common import device_codegens, init_backend_registration

    with _lock:
        init_backend_registration()
        before = device_codegens["cpu"]
        device_codegens["cpu"] = dataclasses.replace(before, cpp_wrapper_codegen=_wrapper())
        try:
            yield dict(_OPTIONS)
        finally:
            device_codegens["cpu"] = before


def _is_known(graph_module: GraphModule) -> bool:
    results = [n.meta.get("val") for n in graph_module.graph.output_node().all_input_nodes]
    return all(
        isinstance(v, Tensor)
        and v.device.type == "cpu"
        and all(isinstance(n, int) for n in v.shape)
        for v in results
    )


@functools.cache
def _wrapper() -> Any:
    """Inductor's wrapper for arrays, with results in memory of their own.

    Inductor keeps a result that is an array in one tensor for each thread, which the next call
    overwrites; the same region runs again and again here, while its results are still read.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu_array_ref import CppWrapperCpuArrayRef
    from torch._inductor.virtualized import V

    class Wrapper(CppWrapperCpuArrayRef):
        @staticmethod
        def create(*_: Any, **__: Any) -> "Wrapper":
            return Wrapper()

        def can_stack_allocate_buffer(self, buffer: Any) -> bool:
            is_result = buffer.get_name() in V.graph.get_output_names()
            return not is_result and super().can_stack_allocate_buffer(buffer)

    return Wrapper
