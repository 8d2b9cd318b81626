"""Products of tokens with the experts they were sent to become calls of one operator, for which
backends have a kernel that reads only the experts that have tokens, each once.

Traced, such a product is a call that loops over the experts in Python or in torch, with a product
of the library for each: a few rows of every expert are read at a fraction of the memory's rate, and
what runs without Python (bundles in C++) has no loop of transformers' to call.

Shape legend: S rows, sorted by expert; E experts; N rows of an expert's weight, K their size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassResult, replace_each
from .torch_types import schema

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)
# torch's operator and, by its name since this package does not load it, transformers' own
_PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


@torch.library.custom_op("polar_fx::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """Each row of x [S, K] times the weight of its expert: [S, N], in the dtype of x and the
    weight, one of `DTYPES`.

    The weight is [E, N, K], or [E, K, N] if `transposed`; ends [E], int32 or int64, has the row
    after the last one of each expert. Rows that no expert has give zeros.
    """
    result = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    start = 0
    for each, end in zip(weight, cast(Any, ends).tolist(), strict=True):
        result[start:end] = x[start:end] @ (each if transposed else each.t())
        start = end
    return result


@cast(Any, grouped_linear).register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


@dataclass(frozen=True)
class _Found:
    """What a product is made of; `weight` is the operand itself."""

    x: Node
    weight: Node
    ends: Node
    transposed: bool


@dataclass(frozen=True)
class GroupedLinear(Pass):
    """Rewrite products of groups of rows with [E, K, N], on the CPU and in one of `DTYPES`, as
    `grouped_linear`.
    """

    name: ClassVar[str] = "grouped-linear"
    preserves_numerics: ClassVar[bool] = False  # a kernel for it sums in another order

    def run(self, gm: GraphModule) -> PassResult:
        return replace_each(gm, _is_product, make=_by_kernel, what="products rewritten")


def _is_product(node: Node) -> bool:
    return _find(node) is not None


def _by_kernel(graph: Graph, node: Node) -> Node:
    found = _find(node)
    assert found is not None
    call = Caller(graph, node)
    target = torch.ops.polar_fx.grouped_linear.default
    return call(target, call.dense(found.x), found.weight, found.ends, found.transposed)


def _find(node: Node) -> _Found | None:
    """What the node is made of, if it is a product that the kernel takes."""
    called = schema(node)
    if called is None or called.name not in _PRODUCTS:
        return None
    names = [argument.name for argument in called.arguments]
    x, weight, ends, *others = (
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in enumerate(names)
    )
    if any(other is not None for other in others):  # a bias, or another dtype
        return None
    if not (isinstance(x, Node) and isinstance(weight, Node) and isinstance(ends, Node)):
        return None
    turned = _turned(weight)
    found = _Found(x=x, weight=turned or weight, ends=ends, transposed=turned is None)
    return found if _fits(found) else None


def _turned(weight: Node) -> Node | None:
    """[E, N, K] of which the weight is the view [E, K, N], if it is one."""
    if weight.op != "call_function" or weight.target is not aten.transpose.int:
        return None
    inner, *axes = weight.args
    return inner if isinstance(inner, Node) and {a % 3 for a in cast(Any, axes)} == {1, 2} else None


def _fits(found: _Found) -> bool:
    """Whether the kernel takes operands like these."""
    values: list[Any] = [n.meta.get("val") for n in (found.x, found.weight, found.ends)]
    x, weight, ends = values
    if not all(isinstance(v, Tensor) and v.device.type == "cpu" for v in values):
        return False
    alike = x.dtype in DTYPES and weight.dtype == x.dtype
    alike = alike and ends.dtype in (torch.int32, torch.int64)
    sizes = x.dim() == 2 and weight.dim() == 3 and ends.shape == weight.shape[:1]
    if not (alike and sizes and weight.is_contiguous()):
        return False
    known = all(isinstance(size, int) and size > 0 for size in (*weight.shape, x.shape[1]))
    return known and x.shape[1] == weight.shape[1 if found.transposed else 2]
