"""A flat graph made by hand: as small as a captured model can be, equal in every torch version.

Shape legend: B batch (2), T tokens (3), L KV length (8), d hidden size (4), V vocabulary (5).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
B, T, L, D, V = 2, 3, 8, 4, 5


class Builder:
    """Adds nodes with example values, each computed on the meta device from its arguments'
    values.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.tensors: dict[str, Tensor] = {}
        self.layer: int | None = None

    def placeholder(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, **meta: Any
    ) -> Node:
        node = self.graph.placeholder(name)
        node.meta = {"role": "input", **meta, "val": torch.empty(shape, dtype=dtype, device="meta")}
        return node

    def slot(self, number: int) -> list[Node]:
        """The keys and the values of a slot."""
        return [
            self.placeholder(f"kv_{number}_{part}", B, 1, L, D, role="kv", slot=number, part=part)
            for part in (0, 1)
        ]

    def weight(self, name: str, *shape: int) -> Node:
        generator = torch.Generator().manual_seed(len(self.tensors))
        self.tensors[name] = torch.nn.Parameter(
            torch.randn(shape, generator=generator), requires_grad=False
        )
        node = self.graph.get_attr(name)
        node.meta = {"val": torch.empty(shape, device="meta")}
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        values = map_arg(args, lambda n: n.meta["val"])
        node.meta = {
            "val": target(
                *values, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})}
            ),
            "layer": self.layer,
        }
        return node

    def build(self, output: Node) -> GraphModule:
        self.graph.output(output)
        return GraphModule(self.tensors, self.graph, class_name="HandMade")


def flat(
    scales: tuple[float, ...] = (0.5, 0.5, 0.5), noise: bool = False, *, head_constant: bool = False
) -> GraphModule:
    """One attention layer per entry of `scales`, a literal in its graph.

    `noise` adds what tracing leaves behind (no-ops and a dead value), `head_constant` a value that
    only the head needs, made of its weights early in the graph.
    """
    b = Builder()
    ids = b.placeholder("input_ids", B, T, dtype=torch.long)
    positions = b.placeholder("positions", B, T, dtype=torch.long)
    index = b.placeholder("kv_index", L, dtype=torch.long)
    slots = list(map(b.slot, range(len(scales))))
    table, norm = b.weight("embedding", V, D), b.weight("norm", D)
    hidden = b.call(aten.embedding.default, table, ids)
    rows = b.call(
        aten.unsqueeze.default, b.call(aten.arange.default, B, device=torch.device("cpu")), 1
    )
    seen = b.call(aten.ge.Tensor, b.call(aten.unsqueeze.default, positions, -1), index)
    mask = b.call(aten.unsqueeze.default, seen, 1)
    if head_constant:
        norm = b.call(aten.add.Tensor, norm, 1.0)
    for i, scale in enumerate(scales):
        b.layer = i
        hidden = _layer(
            b,
            i,
            scale=scale,
            hidden=hidden,
            rows=rows,
            positions=positions,
            mask=mask,
            slots=slots[i],
            noise=noise,
        )
    b.layer = None
    return b.build(b.call(aten.linear.default, b.call(aten.mul.Tensor, hidden, norm), table))


def _layer(
    b: Builder,
    i: int,
    *,
    scale: float,
    hidden: Node,
    rows: Node,
    positions: Node,
    mask: Node,
    slots: list[Node],
    noise: bool,
) -> Node:
    weight = b.weight(f"layers_{i}_weight", D, D)
    projected = b.call(aten.linear.default, hidden, weight)
    if noise:
        projected = b.call(aten.to.dtype, projected, torch.float32)
        projected = b.call(aten.dropout.default, projected, 0.1, False)
        b.call(aten.neg.default, projected)
    states = b.call(aten.unsqueeze.default, projected, 2)
    keys, values = (
        b.call(aten.index_put_.default, slot, [rows, None, positions], states) for slot in slots
    )
    query = b.call(aten.unsqueeze.default, hidden, 1)
    mixed = b.call(aten.scaled_dot_product_attention.default, query, keys, values, mask)
    update = b.call(aten.mul.Tensor, b.call(aten.squeeze.dim, mixed, 1), scale)
    return b.call(aten.add.Tensor, hidden, update)


def single_row(dtype: torch.dtype = torch.float32, rows: int = 1) -> GraphModule:
    """Two linears, one with a bias, over [1, rows, d]."""
    b = Builder()
    shapes = {"x": (1, rows, D), "w1": (V, D), "w2": (D, V), "b": (D,)}
    x, w1, w2, bias = (b.placeholder(name, *shape, dtype=dtype) for name, shape in shapes.items())
    return b.build(b.call(aten.linear.default, b.call(aten.linear.default, x, w1), w2, bias))


def several_rows(
    dtype: torch.dtype = torch.float32, rows: int = 3, *, tokens: int = 1
) -> GraphModule:
    """Two linears, one with a bias, over some tokens of each of some rows, [rows, tokens, d]."""
    b = Builder()
    shapes = {"x": (rows, tokens, D), "w1": (V, D), "w2": (D, V), "b": (D,)}
    x, w1, w2, bias = (b.placeholder(name, *shape, dtype=dtype) for name, shape in shapes.items())
    return b.build(b.call(aten.linear.default, b.call(aten.linear.default, x, w1), w2, bias))


def over_integers(dtype: torch.dtype = torch.float32) -> GraphModule:
    """Three linears over [3, 2, d] whose weights are integers: two a byte, with a bias; int8; and
    int8 as torchao's weight-only tensors are traced.
    """
    b = Builder()
    x, scale, zero, bias, s2, s3 = (
        b.placeholder(name, *shape, dtype=dtype)
        for name, shape in {
            "x": (3, 2, 32),
            "scale": (64, 1, 1),
            "zero": (64, 1, 1),
            "bias": (64,),
            "s2": (D, 1),
            "s3": (V, 1),
        }.items()
    )
    w1 = b.placeholder("w1", 64, 16, dtype=torch.uint8)
    w2 = b.placeholder("w2", D, 64, dtype=torch.int8)
    w3 = b.placeholder("w3", V, D, dtype=torch.int8)
    low = b.call(aten.bitwise_and.Scalar, w1, 15)
    high = b.call(aten.bitwise_right_shift.Tensor_Scalar, w1, 4)
    pairs = b.call(aten.view.default, b.call(aten.stack.default, [low, high], -1), [64, 1, -1])
    groups = b.call(aten.mul.Tensor, b.call(aten.to.dtype, pairs, dtype), scale)
    made = b.call(aten.view.default, b.call(aten.add.Tensor, groups, zero), [64, -1])
    first = b.call(aten.linear.default, x, made, bias)
    made = b.call(aten.mul.Tensor, b.call(aten.to.dtype, w2, dtype), s2)
    second = b.call(aten.reshape.default, b.call(aten.linear.default, first, made), [-1, D])
    turned = b.call(aten.to.dtype, b.call(aten.t.default, w3), dtype)
    product = b.call(aten.mm.default, second, turned)
    factors = b.call(aten.flatten.using_ints, s3)
    return b.build(b.call(aten.mul.Tensor, product, factors))


def with_experts(dtype: torch.dtype = torch.bfloat16) -> GraphModule:
    """Six rows times what three experts have for them: weights [3, 16, 8] whose view is given, and
    then [3, 16, 8] as they are.
    """
    b = Builder()
    x = b.placeholder("x", 6, 8, dtype=dtype)
    ends = b.placeholder("ends", 3, dtype=torch.int32)
    w1, w2 = (b.placeholder(name, 3, 16, 8, dtype=dtype) for name in ("w1", "w2"))
    turned = b.call(aten.transpose.int, w1, -2, -1)
    first = b.call(aten._grouped_mm.default, x, turned, ends)
    return b.build(b.call(aten._grouped_mm.default, first, w2, ends))


def single_query(dtype: torch.dtype = torch.float32) -> GraphModule:
    """Attention of one token: four heads of queries on two of keys, behind a mask."""
    b = Builder()
    shapes = {"q": (1, 4, 1, D), "k": (1, 2, L, D), "v": (1, 2, L, D)}
    operands = [b.placeholder(name, *shape, dtype=dtype) for name, shape in shapes.items()]
    mask = b.placeholder("mask", 1, 1, 1, L, dtype=torch.bool)
    return b.build(
        b.call(aten.scaled_dot_product_attention.default, *operands, mask, enable_gqa=True)
    )


def several_queries(dtype: torch.dtype = torch.float32) -> GraphModule:
    """Attention of three tokens of two rows over two blocks of four columns each, read from stores:
    four heads of queries on two of keys, behind a mask.
    """
    b = Builder()
    query = b.placeholder("q", 2, 4, 3, D, dtype=dtype)
    stores = [b.placeholder(name, 5, 2, 4, D, dtype=dtype) for name in ("k", "v")]
    blocks = b.placeholder("blocks", 2, 2, dtype=torch.long)
    mask = b.placeholder("mask", 2, 1, 3, 8, dtype=torch.bool)
    columns: list[Node] = []
    for store in stores:
        read = b.call(
            aten.permute.default, b.call(aten.index.Tensor, store, [blocks]), [0, 2, 1, 3, 4]
        )
        columns.append(b.call(aten.flatten.using_ints, read, 2, 3))
    return b.build(
        b.call(aten.scaled_dot_product_attention.default, query, *columns, mask, enable_gqa=True)
    )


def on_cpu(gm: GraphModule) -> GraphModule:
    """The same graph with example values on the CPU: some passes are for one kind of device."""
    for node in gm.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            node.meta["val"] = torch.zeros(value.shape, dtype=value.dtype)
    return gm


def operands(gm: GraphModule) -> list[Tensor]:
    """Real operands for the placeholders of a flat, layer or step graph: fixed tokens, empty
    slots.
    """
    made: list[Tensor] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        shape = node.meta["val"].shape
        given = {
            "input_ids": torch.arange(B * T).reshape(B, T) % V,
            "positions": torch.arange(T).expand(B, T),
            "kv_index": torch.arange(L),
            "ends": torch.tensor([2, 2, 6], dtype=torch.int32),
        }
        made.append(
            given[node.name]
            if node.name in given
            else torch.zeros(shape, dtype=node.meta["val"].dtype)
        )
    return made


def run(gm: GraphModule) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, V] and the KV slots afterwards."""
    values = operands(gm)
    with torch.no_grad():
        return gm(*values), values[3:]
