"""Keys and values of a layer graph move from a slot of its own to addresses in a shared store.

A dense slot [B, H, L, E] belongs to one batch, which then has to run one program at one length. By
address, each row brings a list of places in a store: any rows, at whatever steps of their programs,
can be one call, and a call reads the columns that it is given.

Shape legend: B batch, T tokens, L columns given, P places in the store, H KV heads, E head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .base import Caller, Pass, PassError, PassResult, copy_graph_module, role, storage, writes

aten = torch.ops.aten


@dataclass(frozen=True)
class AddressKv(Pass):
    """Replace the KV operands [B, H, L, E] of one layer by stores [P, H, E] and an operand
    `columns` i64[B, L] after them: the place in the stores of each row's column.

    Column `positions` of a row is written as before, and the graph then reads the columns in order.
    Raises PassError for a graph that does anything else with its KV operands.
    """

    name: ClassVar[str] = "address-kv"

    def run(self, gm: GraphModule) -> PassResult:
        operands = [n for n in gm.graph.find_nodes(op="placeholder") if role(n) == "kv"]
        if any(role(n) == "columns" for n in gm.graph.find_nodes(op="placeholder")):
            return PassResult(gm, False)
        if not operands:
            raise PassError(
                self.name, "the graph has no KV operands", "run it on one layer's graph"
            )
        new, graph = copy_graph_module(gm)
        operands = [n for n in graph.find_nodes(op="placeholder") if role(n) == "kv"]
        old = [n.meta["val"] for n in operands]
        with graph.inserting_after(operands[-1]):
            columns = graph.placeholder("columns")
        batch, _, length, _ = old[0].shape
        columns.meta = {"role": "columns", "val": old[0].new_empty(batch, length, dtype=torch.long)}
        for operand, dense in zip(operands, old, strict=True):
            self._address(graph, operand, dense, columns)
        new.recompile()
        return PassResult(new, True, {"stores": len(operands)})

    def _address(self, graph: Graph, operand: Node, dense: torch.Tensor, columns: Node) -> None:
        """Let the one write of a KV operand go to its places, and its readers read from there."""
        _, heads, _, size = dense.shape

        operand.meta["val"] = dense.new_empty(dense.shape[0] * dense.shape[2], heads, size)
        write, position, value = self._write(operand)
        call = Caller(graph, write)
        with graph.inserting_before(write):
            where = call(aten.gather.default, columns, 1, position)
            stored = call(aten.index_put.default, operand, [where], call.cast(value, dense.dtype))
            # in place, as the dense operand was
            stored.target = aten.index_put_.default
            read = call(aten.index.Tensor, stored, [columns])
            read = call(aten.transpose.int, read, 1, 2)
        write.replace_all_uses_with(read)
        for reader in [u for u in operand.users if u not in (stored, write)]:
            reader.replace_input_with(operand, read)
        graph.erase_node(write)

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
