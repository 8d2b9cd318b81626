"""Inductor regions without dynamo guards: the linker checks shapes once per call, not once per layer.

The adapter around torch's semi-public `standalone_compile`; nothing else in the project touches it.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..errors import CaptureError
from ..passes.base import Pass
from ..passes.matvec_to_reduction import MatvecToReduction
from .base import Backend, Region


class InductorBackend(Backend):
    """Each body compiled once per shape class; weights and KV slots are operands, so all layers share the code.

    `options` are Inductor's own; `passes` run on each region's graph once its sizes are known.
    """

    name: ClassVar[str] = "inductor"
    needs_shapes: ClassVar[bool] = True

    def __init__(self, options: dict[str, Any] | None = None, passes: Sequence[Pass] = (MatvecToReduction(),)) -> None:
        self.options, self.passes = dict(options or {}), tuple(passes)

    def compile_region(self, body: GraphModule, example: Sequence[Tensor], dynamic: Sequence[dict[int, str]]) -> Region:
        names = sorted({name for axes in dynamic for name in axes.values()})
        dims = {name: torch.export.Dim(name, min=2, max=1 << 20) for name in names}
        shapes = tuple({axis: dims[name] for axis, name in axes.items()} or None for axes in dynamic)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals
            exported = torch.export.export(_Body(body), (tuple(example),), dynamic_shapes=(shapes,), strict=False)
            if exported.graph_signature.buffers_to_mutate or exported.constants:
                raise CaptureError(f"region {body} holds state of its own; report this model")
            graph_module = exported.graph_module
            for p in self.passes:
                graph_module = p.run(graph_module).graph_module
            artifact = torch._inductor.standalone_compile(
                graph_module,
                _symbolic(graph_module) if names else list(example),
                dynamic_shapes="from_graph" if names else "from_example_inputs",
                options={"config_patches": self.options} if self.options else None,
            )
            multiple = isinstance(body.graph.output_node().args[0], tuple)
        if multiple:
            return artifact
        return lambda *operands: artifact(*operands)[0]


def _symbolic(graph_module: GraphModule) -> list[Any]:
    """The exported graph's own example values, as operands to compile for.

    With real tensors Inductor would make every size a symbol, and equal sizes the same one: three rows and three KV
    heads could then not differ. `example_value` on the outputs is where it looks for the values' fake mode.
    """
    for node in graph_module.graph.output_node().all_input_nodes:
        node.meta["example_value"] = node.meta["val"]
    return [n.meta["val"] for n in graph_module.graph.find_nodes(op="placeholder")]


class _Body(torch.nn.Module):
    def __init__(self, body: GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, operands: tuple[Tensor, ...]) -> Any:
        return self.body(*operands)
