"""The symbol table of a captured model: what links need to know of its bodies, without their
graphs.

It is plain data and prints as JSON, so a process that finds it and the compiled regions on disk
links and runs programs without tracing anything.

Shape legend: B batch, T tokens, L KV length.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..capture import ColumnsSpec, KvSpec, StateSpec
from ..capture.captured import MOST_STATE_TOKENS
from ..passes.address_kv import BLOCK
from ..passes.base import body, in_slot, kind, layer_calls, role
from ..passes.text import structure_text
from ..program import Program
from ..program.slots import slot_steps

_AXES = {"B": "batch", "T": "tokens", "L": "length", "P": "pool", "W": "blocks"}


@dataclass(frozen=True)
class Operand:
    """One operand of a body.

    Sizes and strides are text: a number, or an expression of B, T, L, W (blocks a row) and P
    (blocks of a store).
    """

    role: str
    dtype: str
    size: tuple[str, ...]
    stride: tuple[str, ...]

    def example(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        """An operand of that layout, for B, T and L of `sizes`; its contents are arbitrary."""
        import sympy  # half a second, and only compiling needs it

        def numbers(texts: tuple[str, ...]) -> list[int]:
            return [int(sympy.sympify(text).subs(sizes)) for text in texts]  # type: ignore[arg-type]

        return torch.empty_strided(
            numbers(self.size),
            numbers(self.stride),
            dtype=getattr(torch, self.dtype),
            device=device,
        )

    def axes(self) -> dict[int, str]:
        """The axes that follow a size of the call: its batch, tokens, columns, its
        blocks or those of the KV store; "4*batch" where heads are folded into its rows."""
        found: dict[int, str] = {}
        for i, size in enumerate(self.size):
            times, _, name = size.rpartition("*")
            if name in _AXES and (not times or times.isdecimal()):
                found[i] = f"{times}*{_AXES[name]}" if times else _AXES[name]
        return found


def addressed(operands: tuple["Operand", ...]) -> tuple["Operand", ...]:
    """The operands of a body after the pass address-kv: KV stores [P, H, C, E], then blocks [B, W].

    Bodies without KV operands stay as they are.
    """
    found: list[Operand] = []
    for operand in operands:
        if operand.role != "kv":
            found.append(operand)
            continue
        _, heads, _, size = operand.size
        strides = [str(n * int(size)) for n in (int(heads) * BLOCK, BLOCK, 1)]
        store = ("P", heads, str(BLOCK), size)
        found.append(Operand("kv", operand.dtype, store, (*strides, "1")))
    last = max((i for i, o in enumerate(found) if o.role == "kv"), default=None)
    if last is not None:
        found.insert(last + 1, Operand("blocks", "int64", ("B", "W"), ("W", "1")))
    return tuple(found)


@dataclass(frozen=True)
class BodySymbols:
    """A body as its callers see it.

    `fingerprint` (sha256) covers operators, wiring, literals and operands.
    """

    fingerprint: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Symbol:
    """One call: the body's name, and the operands it passes beside hidden state and KV.

    `sides` index the list of side values (graph inputs, then prologue results); `weights` name the
    model's tensors.
    """

    target: str
    sides: tuple[int, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class SymbolTable:
    """Everything about a captured model but graphs and weights.

    `owners` names, for each layer that only reads keys and values, the layer that writes them: the
    spec of such a reader is empty, and its calls take the slot of its owner. Equal specs are one
    object, so that what every call looks up by its spec can be found by identity.
    """

    bodies: dict[str, BodySymbols]
    prologue: Symbol
    layers: tuple[Symbol, ...]
    epilogue: Symbol
    kv_specs: tuple[KvSpec, ...]
    owners: dict[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        one_of: dict[KvSpec, KvSpec] = {}
        specs = tuple(one_of.setdefault(spec, spec) for spec in self.kv_specs)
        object.__setattr__(self, "kv_specs", specs)

    def calls(self) -> tuple[Symbol, ...]:
        """Every call, in the order of the identity program."""
        return (self.prologue, *self.layers, self.epilogue)

    @property
    def keeps_states(self) -> bool:
        """Whether any layer keeps a state beside keys and values."""
        return any(spec.states for spec in self.kv_specs)

    @property
    def most_tokens(self) -> int:
        """How many tokens a row a call should bring at most."""
        return MOST_STATE_TOKENS if self.keeps_states else sys.maxsize

    def slot_spec(self, layer: int) -> KvSpec:
        """The geometry of the slot that a call of the layer takes, which may be that of its
        owner.
        """
        return self.kv_specs[self.owners.get(layer, layer)]

    def slot_steps(self, program: Program) -> list[int]:
        """For each step the one whose slot it takes: itself, or, of a reader, the latest step of
        its owner before it.

        Raises ProgramError if there is none.
        """
        return slot_steps(program, self.owners)

    def ends_in_kv_writes(self, layer: int) -> bool:
        """Whether a prefill whose last step is of this layer may run it for its keys and values
        alone, and the rest of it for one token, whose keys and values are then written twice.

        A state must not see a token twice, and a layer may have nothing to write.
        """
        spec = self.kv_specs[layer]
        return spec.num_kv > 0 and not spec.states

    def ending(self, layers: Sequence[int]) -> tuple[int, bool]:
        """How a prefill whose last steps are of these layers ends, where logits of one token a row
        are wanted: how many of the steps run for these tokens alone, and whether the first of them
        runs for the keys and values of all tokens before.

        Those are the steps that only read keys and values, and the one in front of these if
        `ends_in_kv_writes`.
        """
        count = 0
        for layer in reversed(layers):
            if layer not in self.owners:
                cut = self.ends_in_kv_writes(layer)
                return count + cut, cut
            count += 1
        return count, False

    def batch_axes(self) -> dict[int, int | None] | None:
        """The axis of the batch in each side value, None for one without; None if one cannot be
        told.

        Some models fold the rows of a batch into another axis, such as that of heads.
        """
        axes: dict[int, int | None] = {}
        for call in self.calls():
            operands = self.bodies[call.target].operands
            sides = [operand for operand in operands if operand.role in ("side", "input")]
            for number, operand in zip(call.sides, sides, strict=True):
                found = [i for i, name in operand.axes().items() if name == "batch"]
                if len(found) > 1 or (not found and any("B" in size for size in operand.size)):
                    return None
                axes[number] = found[0] if found else None
        return axes

    def to_json(self) -> str:
        """Readable JSON; `from_json` is the inverse."""
        table = asdict(self)
        if not self.owners:
            del table["owners"]
        for spec, plain in zip(self.kv_specs, table["kv_specs"], strict=True):
            plain["dtype"] = _name(spec.dtype)
            # as files have called them since only keys were among them
            more = ("more_columns", "more_keys", spec.more_columns)
            for name, called, parts in (("states", "states", spec.states), more):
                found = plain.pop(name)
                if parts:
                    plain[called] = [
                        {**part, "dtype": _name(own.dtype)}
                        for part, own in zip(found, parts, strict=True)
                    ]
        return json.dumps(table, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SymbolTable":
        """Raises KeyError, TypeError, ValueError or AttributeError on text that is not a symbol
        table.
        """
        table: dict[str, Any] = json.loads(text)
        specs = map(_spec, table["kv_specs"])

        def body(entry: dict[str, Any]) -> BodySymbols:
            operands = [
                Operand(o["role"], o["dtype"], tuple(o["size"]), tuple(o["stride"]))
                for o in entry["operands"]
            ]
            return BodySymbols(entry["fingerprint"], tuple(operands))

        def call(entry: dict[str, Any]) -> Symbol:
            return Symbol(entry["target"], tuple(entry["sides"]), tuple(entry["weights"]))

        bodies = {name: body(entry) for name, entry in table["bodies"].items()}
        layers = tuple(map(call, table["layers"]))
        owners = {int(layer): int(own) for layer, own in table.get("owners", {}).items()}
        ends = call(table["prologue"]), call(table["epilogue"])
        return cls(bodies, ends[0], layers, ends[1], tuple(specs), owners)


def _spec(plain: dict[str, Any]) -> KvSpec:
    states = tuple(
        StateSpec(tuple(state["size"]), getattr(torch, state["dtype"]))
        for state in plain.get("states", ())
    )
    more = tuple(
        ColumnsSpec(keys["heads"], keys["size"], getattr(torch, keys["dtype"]))
        for keys in plain.get("more_keys", ())
    )
    dtype = getattr(torch, plain["dtype"])
    return KvSpec(plain["heads"], plain["key_size"], plain["value_size"], dtype, states, more)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_symbols(graph_module: GraphModule, kv_specs: tuple[KvSpec, ...]) -> SymbolTable:
    """The symbol table of an outlined graph."""
    graph = graph_module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder" and role(n) == "input"]
    ends = {kind(n): n for n in graph.nodes if kind(n) in ("prologue", "epilogue")}
    results = {
        u: len(inputs) + int(u.args[1]) for u in ends["prologue"].users if u.op == "call_function"
    }  # type: ignore[arg-type]
    places: dict[Node, int] = {**{n: i for i, n in enumerate(inputs)}, **results}
    (batch, tokens), (length,) = inputs[0].meta["val"].shape, inputs[2].meta["val"].shape
    names = {str(size): name for size, name in ((batch, "B"), (tokens, "T"), (length, "L"))}
    calls = (ends["prologue"], *layer_calls(graph_module), ends["epilogue"])
    symbols = [_symbol(graph_module, c, places=places) for c in calls]
    bodies = {str(c.target): _body(body(graph_module, c), names) for c in calls}
    layers = tuple(symbols[1:-1])
    return SymbolTable(bodies, symbols[0], layers, symbols[-1], kv_specs, _owners(graph_module))


def _owners(graph_module: GraphModule) -> dict[int, int]:
    """The layers that take the slot of another layer, and which."""
    found: dict[int, int] = {}
    for call in layer_calls(graph_module):
        layer = call.meta["layer"]
        for source in call.all_input_nodes:
            if in_slot(source) and source.meta["slot"] != layer:
                found[layer] = source.meta["slot"]
    return found


def _symbol(graph_module: GraphModule, call: Node, *, places: dict[Node, int]) -> Symbol:
    roles = [role(n) for n in body(graph_module, call).graph.find_nodes(op="placeholder")]
    sides: list[int] = []
    weights: list[str] = []
    for operand_role, argument in zip(roles, call.args, strict=True):
        assert isinstance(argument, Node)
        if operand_role in ("side", "input"):
            sides.append(places[argument])
        elif operand_role == "weight":
            weights.append(str(argument.target))
    return Symbol(str(call.target), tuple(sides), tuple(weights))


def _body(graph_module: GraphModule, names: Mapping[str, str]) -> BodySymbols:
    import sympy

    def text(size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = size.node.expr
        return str(
            expression.xreplace(
                {s: sympy.Symbol(names.get(str(s), str(s))) for s in expression.free_symbols}
            )
        )

    operands = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        size, stride = tuple(map(text, value.shape)), tuple(map(text, value.stride()))
        operands.append(Operand(str(role(node)), _name(value.dtype), size, stride))
    whole = structure_text(graph_module) + "\n" + "\n".join(map(str, operands))
    return BodySymbols(hashlib.sha256(whole.encode()).hexdigest(), tuple(operands))
