"""What lies between the kernels of a region, as arrays on the CPU's stack where its size is known:
decoding one row, a layer would otherwise make some fifty tensors and views of them at every call, a
quarter of the time that a small layer takes.

The adapter around Inductor's wrapper that can do so; nothing else in the project touches it. It
leaves arrays out where a graph calls the library or needs more than 102,400 numbers of them.
"""

import dataclasses
import functools
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

_OPTION = "aot_inductor.allow_stack_allocation"
# The results of a region; upstream's own test of what is a tensor
_IS_TENSOR = " || ".join(
    f"std::is_same_v<std::decay_t<decltype({{0}})>, {kind}>"
    for kind in ("RAIIAtenTensorHandle", "AtenTensorHandle", "ConstantHandle")
)


def stack_options(graph_module: GraphModule) -> dict[str, Any]:
    """Options to compile a graph of the CPU with; none for a graph that is elsewhere."""
    values = (node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder"))
    if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in values):
        return {}
    _install()
    return {_OPTION: True}


@functools.cache
def _install() -> None:
    """Let Inductor take our wrapper for the CPU where arrays are allowed; it decides that once in a
    process by itself.
    """
    from torch._inductor.codegen.common import device_codegens, init_backend_registration

    init_backend_registration()
    before = device_codegens["cpu"]
    device_codegens["cpu"] = dataclasses.replace(before, cpp_wrapper_codegen=_wrapper())


def _wrapper() -> Any:
    """Inductor's wrapper for arrays, with results that are tensors of their own.

    Inductor keeps a result that is an array in one tensor for each thread, which the next call of
    the region overwrites; regions run again and again here, while their results are still read.
    """
    from torch._inductor import config, ir
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.codegen.cpp_wrapper_cpu_array_ref import CppWrapperCpuArrayRef
    from torch._inductor.codegen.wrapper import ReuseLine
    from torch._inductor.virtualized import V

    def owner_of(name: str) -> str | None:
        """The buffer in whose memory this one lies."""
        buffer: Any = V.graph.try_get_buffer(name)
        layout = buffer.get_output_spec() if isinstance(buffer, ir.Buffer) else None
        return layout.view.get_name() if isinstance(layout, ir.NonOwningLayout) else None

    class Wrapper(CppWrapperCpuArrayRef):
        memory_of_results: set[str] | None = None

        @staticmethod
        def create(*given: Any, **named: Any) -> Any:
            allowed = config.aot_inductor.allow_stack_allocation
            return Wrapper() if allowed else CppWrapperCpu.create(*given, **named)

        def memory_plan_reuse(self) -> None:
            super().memory_plan_reuse()
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
