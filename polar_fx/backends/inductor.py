"""Inductor regions without dynamo guards: the linker checks shapes once per call, not once per
layer.

The adapter around torch's semi-public `standalone_compile`; nothing else in the project touches it.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..passes.attention_over_blocks import AttentionOverBlocks
from ..passes.attention_to_reduction import AttentionToReduction
from ..passes.base import Pass
from ..passes.grouped_linear import GroupedLinear
from ..passes.linear_to_onednn import LinearToOneDnn
from ..passes.linear_to_row_kernel import LinearToRowKernel
from ..passes.matvec_to_reduction import MatvecToReduction
from ..passes.quantized_linear import QuantizedLinear
from . import block_attention, onednn_linear
from .base import Backend, Dynamic, Region
from .specialize import compiler_options, example_values, graph_of, specialize

# What pays on a region of known sizes (docs/performance.md); all leave graphs on other devices
# alone.
REGION_PASSES: tuple[Pass, ...] = (
    QuantizedLinear(),  # before others see its linears
    GroupedLinear(),
    LinearToRowKernel(),
    MatvecToReduction(),  # what is left of one row
    *([LinearToOneDnn()] if onednn_linear.is_faster() else []),  # what is left of several
    *([AttentionOverBlocks()] if block_attention.is_faster() else []),
    AttentionToReduction(),  # what is left of one token
)


class InductorBackend(Backend):
    """Each body compiled once per shape class, in this process; weights and KV slots are operands,
    so layers share the code.
    """

    name: ClassVar[str] = "inductor"
    needs_shapes: ClassVar[bool] = True

    def __init__(
        self, options: Mapping[str, Any] | None = None, passes: Sequence[Pass] = REGION_PASSES
    ) -> None:
        super().__init__(options, passes)

    def compile_region(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic
    ) -> Region:
        exported = specialize(body, example, dynamic=dynamic)
        symbolic = any(dynamic)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals
            graph_module = graph_of(exported, self.passes)
            options = compiler_options(graph_module, self.options)
            if symbolic:
                for node in graph_module.graph.output_node().all_input_nodes:
                    # where Inductor looks for the values' fake mode
                    node.meta["example_value"] = node.meta["val"]
            artifact = torch._inductor.standalone_compile(
                graph_module,
                example_values(graph_module) if symbolic else list(example),
                dynamic_shapes="from_graph" if symbolic else "from_example_inputs",
                options={"config_patches": options} if options else None,
            )
        return lambda operands: artifact(*operands)
