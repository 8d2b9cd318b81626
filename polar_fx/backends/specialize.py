"""A body for one shape class: `torch.export` with the sizes that may vary as symbols and the others
fixed.
"""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..errors import CaptureError, CompileError
from ..passes.address_kv import BLOCK
from ..passes.base import Pass, PassError
from ..passes.matvec_to_reduction import is_single_row
from ..passes.pipeline import region_pipeline
from ..passes.verify import VerifyError
from .base import Dynamic
from .kernels import kernel_options


class _Body(torch.nn.Module):
    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, operands: tuple[Tensor, ...]) -> Any:
        return self.body(*operands)


_LARGEST = 1 << 20


def specialize(
    body: torch.nn.Module,
    example: Sequence[Tensor],
    *,
    dynamic: Dynamic,
    largest: Mapping[str, int] | None = None,
) -> ExportedProgram:
    """The body exported for the example's shape class; `largest` bounds the sizes that may vary, by
    their names. An axis may be a multiple of one ("4*batch").

    Raises CaptureError if it holds tensors of its own.
    """
    names = sorted({name.rpartition("*")[2] for axes in dynamic for name in axes.values()})
    dims = {
        name: torch.export.Dim(name, min=2, max=(largest or {}).get(name, _LARGEST))
        for name in names
    }
    if "blocks" in dims and "length" in dims:
        dims["length"] = BLOCK * dims["blocks"]

    def dim(name: str) -> Any:
        times, _, name = name.rpartition("*")
        return int(times) * dims[name] if times else dims[name]

    def dims_of(axes: Mapping[int, str]) -> dict[int, Any] | None:
        return {axis: dim(name) for axis, name in axes.items()} or None

    shapes = tuple(map(dims_of, dynamic))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals
        exported = exported_graph(_Body(body), (tuple(example),), shapes=(shapes,))
    if exported.graph_signature.buffers_to_mutate or exported.constants:
        raise CaptureError(f"region {body} holds state of its own; report this model")
    return exported


def exported_graph(module: torch.nn.Module, example: Any, *, shapes: Any) -> ExportedProgram:
    """`torch.export` of a module; `shapes` name the sizes that may vary.

    Where torch cannot prove a relation of sizes, such as min(16 * L, 32 * L) == 16 * L before 2.13,
    it is left to be asserted at runtime: the sizes that our tables hand over fulfil it.
    """
    how: dict[str, Any] = {"dynamic_shapes": shapes, "strict": False}
    try:
        return torch.export.export(module, example, **how)
    except UserError:
        how["prefer_deferred_runtime_asserts_over_guards"] = True
        return torch.export.export(module, example, **how)


def save(exported: ExportedProgram, path: Path) -> None:
    """Write the graph, without the example operands: the user's weights are among them."""
    exported.example_inputs = None  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, path)


def load_graph(path: Path) -> ExportedProgram:
    """The exported graph of a file, in whatever process: operators that transformers registers in
    Python are registered first.
    """
    if b"torch.ops.transformers." in path.read_bytes():  # mixtures of experts
        importlib.import_module("transformers.integrations.moe")
    return torch.export.load(path)


def graph_of(exported: ExportedProgram, passes: Sequence[Pass] = ()) -> GraphModule:
    """The exported graph as a plain function of its operands, after `passes`.

    Raises CompileError for a pass that fails, or leaves another graph than a region may have.
    """
    graph_module = exported.graph_module
    pipeline = region_pipeline(passes, example_values(graph_module))
    try:
        return pipeline.run(graph_module).graph_module
    except (PassError, VerifyError) as error:
        raise CompileError(
            f"the passes of the backend ({pipeline}) cannot be used on a region: {error}; leave "
            "out the one at fault with passes="
        ) from error


def compiler_options(graph_module: GraphModule, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options to compile a graph with: the user's; what a kernel of ours in it needs; and on a
    GPU, where it multiplies one row, tuning of block sizes.

    With tuning, Inductor turns a product of one row into a reduction, and reads the weights at up
    to 2.4 times the rate of cuBLAS (H200, bf16, 896 x 4,864: 4,015 against 1,682 GB/s; 3,584 x
    18,944: 4,366 against 3,616; docs/gpu.md).
    """
    one_row = any(is_single_row(node, "cuda") for node in graph_module.graph.nodes)
    tuned = {"coordinate_descent_tuning": True} if one_row else {}
    return {**tuned, **kernel_options(graph_module), **options}


def example_values(graph_module: GraphModule) -> list[Any]:
    """The graph's own example values, as operands to compile for.

    With real tensors Inductor would make every size a symbol, and equal sizes the same one: three
    rows and three KV heads could then not differ.
    """
    return [n.meta["val"] for n in graph_module.graph.find_nodes(op="placeholder")]


def like(value: Tensor) -> Tensor:
    """A real tensor of a traced value's layout, with the example sizes of its symbols; its contents
    are arbitrary.
    """
    sizes = [example_size(s) for s in value.shape]
    strides = [example_size(s) for s in value.stride()]
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def example_size(size: int | torch.SymInt) -> int:
    """A size as in the example; unlike `int`, this does not make a symbol that size for good."""
    return size.node.hint if isinstance(size, torch.SymInt) else size
