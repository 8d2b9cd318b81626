"""Keys and values of a layer graph move from a slot of its own to blocks of a shared store.

A dense slot [B, H, L, E] belongs to one batch, which then has to run one program at one length. By
address, each row brings the numbers of its blocks in a store: any rows, at whatever steps of their
programs, can be one call, and a call reads as many columns as it is given blocks.

Shape legend: B batch, T tokens, W blocks given, C columns of a block, L = W * C columns, P blocks
of the store, H KV heads, E head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .base import (
    Caller,
    Pass,
    PassError,
    PassResult,
    copy_graph_module,
    role,
    storage,
    writes,
    writes_slot,
)

aten = torch.ops.aten


BLOCK = 16  # columns that are held together


@dataclass(frozen=True)
class AddressKv(Pass):
    """Replace the KV operands [B, H, L, E] of one layer by stores [P, H, C, E] and an operand
    `blocks` i64[B, W] after them: which block of the stores holds each row's columns w * C to
    (w + 1) * C - 1.

    Column `positions` of a row is written as before, and the graph then reads the columns in order.
    A graph may also only read them, those of another layer. L must be a multiple of C. Raises
    PassError for a graph that does anything else with its KV operands.
    """

    name: ClassVar[str] = "address-kv"
    # the same bits, from operands of another layout
    preserves_numerics: ClassVar[bool] = False
    block: int = BLOCK

    def run(self, gm: GraphModule) -> PassResult:
        if any(role(n) == "blocks" for n in gm.graph.find_nodes(op="placeholder")):
            return PassResult(gm, False)
        if not any(role(n) == "kv" for n in gm.graph.find_nodes(op="placeholder")):
            raise PassError(
                self.name, "the graph has no KV operands", "run it on one layer's graph"
            )
        new, graph = copy_graph_module(gm)
        operands = [n for n in graph.find_nodes(op="placeholder") if role(n) == "kv"]
        with graph.inserting_after(operands[-1]):
            blocks = graph.placeholder("blocks")
        dense = operands[0].meta["val"]
        batch, _, length, _ = dense.shape
        numbers = dense.new_empty(batch, length // self.block, dtype=torch.long)
        blocks.meta = {"role": "blocks", "val": numbers}
        if not writes_slot(new):
            for operand in operands:
                self._address_readers(graph, operand, blocks=blocks)
            new.recompile()
            return PassResult(new, True, {"stores": len(operands)})
        order = {node: i for i, node in enumerate(graph.nodes)}
        places: dict[Node, tuple[Node, Node]] = {}
        for operand in sorted(operands, key=lambda n: order[self._write(n)[0]]):
            self._address(graph, operand, blocks=blocks, places=places)
        new.recompile()
        return PassResult(new, True, {"stores": len(operands)})

    def _address(
        self,
        graph: Graph,
        operand: Node,
        *,
        blocks: Node,
        places: dict[Node, tuple[Node, Node]],
    ) -> None:
        """Let the one write of a KV operand go to its block, and its readers read from there.

        `places` holds the block and the column in it of each position, once they are computed.
        """
        dense = self._stored(operand)
        write, position, value = self._write(operand)
        call = Caller(graph, write)
        with graph.inserting_before(write):
            if position not in places:
                number = call(aten.floor_divide.default, position, self.block)
                block = call(aten.gather.default, blocks, 1, number)
                places[position] = block, call(aten.remainder.Scalar, position, self.block)
            block, column = places[position]
            value = call.cast(value, dense.dtype)
            stored = call(aten.index_put.default, operand, [block, None, column], value)
            # in place, as the dense operand was
            stored.target = aten.index_put_.default
            read = _read(call, stored, blocks=blocks)
        write.replace_all_uses_with(read)
        for reader in [u for u in operand.users if u not in (stored, write)]:
            reader.replace_input_with(operand, read)
        graph.erase_node(write)

    def _address_readers(self, graph: Graph, operand: Node, *, blocks: Node) -> None:
        """Let the readers of a KV operand that nothing here writes read its blocks."""
        self._stored(operand)
        readers = sorted(operand.users)
        for first in readers[:1]:
            with graph.inserting_before(first):
                read = _read(Caller(graph, first), operand, blocks=blocks)
            for reader in readers:
                reader.replace_input_with(operand, read)

    def _stored(self, operand: Node) -> torch.Tensor:
        """Let a KV operand be a store; the value that it had, of a slot."""
        dense = operand.meta["val"]
        batch, heads, length, size = dense.shape
        blocks = batch * (length // self.block)
        operand.meta["val"] = dense.new_empty(blocks, heads, self.block, size)
        return dense

    def _write(self, operand: Node) -> tuple[Node, Node, Any]:
        """The write of a KV operand, the column [B, T] of each token, and what is written."""
        found = [u for u in operand.users if writes(u) and storage(u) is operand]
        if len(found) == 1 and found[0].target is aten.index_put_.default:
            places: Any = found[0].args[1]
            if len(places) == 3 and places[1] is None and isinstance(places[2], Node):
                return found[0], places[2], found[0].args[2]
        wrong = ", ".join(str(n.target) for n in found) or "nothing"
        raise PassError(
            self.name,
            f"{operand} is written by {wrong}, not by one index_put_ at rows and positions",
            "report this model",
        )


def _read(call: Caller, store: Node, *, blocks: Node) -> Node:
    """The columns [B, H, L, E] of the rows' blocks, in order."""
    read = call(aten.index.Tensor, store, [blocks])
    read = call(aten.permute.default, read, [0, 2, 1, 3, 4])
    return call(aten.flatten.using_ints, read, 2, 3)
