"""Structurally equal layers share one body; only their operands differ.

Equality is equality of the whole canonical text (operators, wiring, literals, dtypes, shapes), not
of a hash: two layers that differ in one constant, such as a per-layer scale, stay apart.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from .base import Pass, PassResult, body, copy_graph_module, layer_calls
from .text import structure_text


@dataclass(frozen=True)
class DedupeLayers(Pass):
    """Point all calls of equal bodies at one body, named `layer_kind_0`, `layer_kind_1` ... in
    order of use.
    """

    name: ClassVar[str] = "dedupe-layers"

    def run(self, gm: GraphModule) -> PassResult:
        texts = {str(call.target): structure_text(body(gm, call)) for call in layer_calls(gm)}
        kinds: dict[str, str] = {}
        for text in texts.values():
            kinds.setdefault(text, f"layer_kind_{len(kinds)}")
        renamed = {target: kinds[text] for target, text in texts.items()}
        if all(target == name for target, name in renamed.items()):
            return PassResult(gm, False)
        new, graph = copy_graph_module(gm)
        for call in layer_calls(new):
            name = renamed[str(call.target)]
            if not hasattr(new, name):
                new.add_submodule(name, body(gm, call))
            call.target = name
        counts = {"layer graphs": f"{len(texts)} -> {len(kinds)}"}
        return PassResult(GraphModule(new, graph), True, counts)
