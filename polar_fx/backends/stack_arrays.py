"""What lies between the kernels of a region, as arrays on the CPU's stack where its size is known:
decoding one row, a layer would otherwise make some fifty tensors and views of them at every call, a
quarter of the time that a small layer takes.

The adapter around Inductor's wrapper that can do so; nothing else in the project touches it. It
leaves arrays out where a graph calls the library or needs more than 102,400 numbers of them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

# Inductor's own option stays as it is while it compiles: it would choose upstream's wrapper, and
# headers ten times as large.
_OPTION = "aot_inductor.allow_stack_allocation"
_wanted: ContextVar[bool] = ContextVar("stack arrays", default=False)
# The results of a region; upstream's own test of what is a tensor
_IS_TENSOR = " || ".join(
    f"std::is_same_v<std::decay_t<decltype({{0}})>, {kind}>"
    for kind in ("RAIIAtenTensorHandle", "AtenTensorHandle", "ConstantHandle")
)


@contextlib.contextmanager
def stack_arrays(graph_module: GraphModule, options: Mapping[str, Any]) -> Iterator[None]:
    """Let Inductor compile a graph so, within it: one on the CPU whose results have known sizes,
    unless the user's options say otherwise.
    """
    _install()
    token = _wanted.set(options.get(_OPTION, True) and _is_known(graph_module))
    try:
        yield
    finally:
        _wanted.reset(token)


def _is_known(graph_module: GraphModule) -> bool:
    results = graph_module.graph.output_node().all_input_nodes
    for value in (node.meta.get("val") for node in results):
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return False
        if not all(isinstance(size, int) for size in value.shape):
            return False
    return len(results) > 0


@functools.cache
def _install() -> None:
    """Let Inductor take our wrapper for the CPU where it is wanted."""
    from torch._inductor.codegen.common import device_codegens, init_backend_registration

    init_backend_registration()
    before = device_codegens["cpu"]
    wrapper = _wrapper(before.cpp_wrapper_codegen)
    device_codegens["cpu"] = dataclasses.replace(before, cpp_wrapper_codegen=wrapper)


def _wrapper(usual: Any) -> Any:
    """Inductor's wrapper for arrays, with results that are tensors of their own; or its usual one.

    Inductor keeps a result that is an array in one tensor for each thread, which the next call of
    the region overwrites; regions run again and again here, while their results are still read.
    """
    from torch._inductor import config, ir
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.codegen.cpp_wrapper_cpu_array_ref import CppWrapperCpuArrayRef
    from torch._inductor.codegen.wrapper import EnterSubgraphLine, ReuseLine
    from torch._inductor.virtualized import V

    def owner_of(name: str) -> str | None:
        """The buffer in whose memory this one lies."""
        buffer: Any = V.graph.try_get_buffer(name)
        layout = buffer.get_output_spec() if isinstance(buffer, ir.Buffer) else None
        return layout.view.get_name() if isinstance(layout, ir.NonOwningLayout) else None

    class Wrapper(CppWrapperCpuArrayRef):
        memory_of_results: set[str] | None = None

        def __init__(self) -> None:
            super().__init__()
            self.allow_stack_allocation = True

        @staticmethod
        def create(*given: Any, **named: Any) -> Any:
            return Wrapper() if _wanted.get() else usual.create(*given, **named)

        @staticmethod
        def get_device_include_path_aot(device: str) -> str:
            """The usual header, and what arrays need beside it."""
            arrays = "#include <torch/csrc/inductor/aoti_runtime/arrayref_tensor.h>"
            return f"{CppWrapperCpu.get_device_include_path_aot(device)}\n{arrays}"

        def memory_plan_reuse(self) -> None:
            with config.patch({_OPTION: self.allow_stack_allocation}):
                super().memory_plan_reuse()
            if any(isinstance(line, EnterSubgraphLine) for line in self.lines):
                self.allow_stack_allocation = False  # upstream's subgraphs hand on tensors alone
            before: dict[str, str] = {}
            for line in self.lines:
                if isinstance(line, ReuseLine):
                    before[line.reused_as.get_name()] = line.node.get_name()
            self.memory_of_results = set()
            waiting: list[str | None] = list(V.graph.get_output_names())
            while waiting:
                name = waiting.pop()
                if name is not None and name not in self.memory_of_results:
                    self.memory_of_results.add(name)
                    waiting += [before.get(name), owner_of(name)]

        def can_stack_allocate_buffer(self, buffer: Any) -> bool:
            if self.memory_of_results is None or buffer.get_name() in self.memory_of_results:
                return False
            return super().can_stack_allocate_buffer(buffer)

        def generate_return(self, output_refs: list[str]) -> None:
            for result, value in zip(output_refs, V.graph.graph_outputs, strict=True):
                if not isinstance(value, (ir.ShapeAsConstantBuffer, ir.NoneAsConstantBuffer)):
                    self.wrapper_call.writeline(f"static_assert({_IS_TENSOR.format(result)});")
            CppWrapperCpu.generate_return(self, output_refs)

    return Wrapper
