"""The symbol table: what it says of calls, how it prints and parses, and libraries that know no
more than it.

Shape legend: B batch, T tokens, L KV length.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule

from hand_made import aten, flat
from places import child_environment
from polar_fx.capture import CapturedModel
from polar_fx.errors import CaptureError
from polar_fx.library import LayerLibrary
from polar_fx.library.symbols import Operand, SymbolTable, read_symbols
from polar_fx.passes import library_pipeline
from polar_fx.program import Program
from slow_cases import some_slow
from tiny_models import make_slots, prompts, tiny

FAMILIES = ("llama", "gemma2", "gpt2", "qwen2_moe", "phi3", "deepseek_v3")
each_family = pytest.mark.parametrize("family", some_slow(FAMILIES, ("phi3",)))


# ---------------------------------------------------------------------------------- print and parse


@each_family
def test_json_parses_back(family: str) -> None:
    table = tiny(family).library.table
    again = SymbolTable.from_json(table.to_json())
    assert again == table and again.to_json() == table.to_json()
    assert all(spec.dtype == torch.float32 for spec in again.kv_specs) and len(again.kv_specs) == 4


def test_dtypes_survive() -> None:
    specs = tuple(
        dataclasses.replace(s, dtype=torch.bfloat16) for s in tiny("llama").captured.kv_specs
    )
    table = read_symbols(_outlined(), specs)
    assert {s.dtype for s in SymbolTable.from_json(table.to_json()).kv_specs} == {torch.bfloat16}


DAMAGE: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: "",
    "half of it": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1]",
    "no field": lambda text: "{}",
    "no bodies": lambda text: json.dumps({**json.loads(text), "bodies": None}),
    "a call of nothing": lambda text: json.dumps({**json.loads(text), "prologue": None}),
    "an unknown dtype": lambda text: text.replace('"float32"', '"float33"'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_text_that_is_no_table_is_refused(name: str) -> None:
    text = tiny("llama").library.table.to_json()
    assert DAMAGE[name](text) != text
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        SymbolTable.from_json(DAMAGE[name](text))


@pytest.mark.child_process
def test_tables_are_equal_in_another_process() -> None:
    code = "from tiny_models import tiny; print(tiny('gemma2').library.table.to_json(), end='')"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    assert other.stdout == tiny("gemma2").library.table.to_json()


# ------------------------------------------------------------------------------------- what it says


@each_family
def test_operands_come_in_the_order_in_which_links_pass_them(family: str) -> None:
    library = tiny(family).library
    for call in library.table.calls():
        roles = [o.role for o in library.table.bodies[call.target].operands]
        layer = call not in (library.table.prologue, library.table.epilogue)
        first = ["hidden"] if call != library.table.prologue else []
        side = ["side" if first else "input"] * len(call.sides)
        assert roles == [*first, *side, *["kv"] * (2 * layer), *["weight"] * len(call.weights)], (
            call.target
        )


@each_family
def test_examples_have_the_layout_that_the_graph_was_traced_with(family: str) -> None:
    library = tiny(family).library
    sizes = {"B": 5, "T": 11, "L": 29}
    for name, body in library.table.bodies.items():
        nodes = library.bodies[name].graph.find_nodes(op="placeholder")
        for node, operand in zip(nodes, body.operands, strict=True):
            example, traced = operand.example(sizes, library.device), node.meta["val"]
            assert example.dtype == traced.dtype and example.dim() == traced.dim()
            fixed = {i: s for i, s in enumerate(traced.shape) if isinstance(s, int)}
            assert fixed.items() <= dict(enumerate(example.shape)).items()
            varying = {size for i, size in enumerate(example.shape) if i not in fixed}
            assert {sizes[s] for s in operand.size if s in sizes} == varying
            assert example.is_contiguous() == traced.is_contiguous()
        for call in library.table.calls():
            if call.target == name and call.weights:
                operands = body.operands[-len(call.weights) :]
                for operand, weight in zip(
                    operands, (library.tensors[n] for n in call.weights), strict=True
                ):
                    example = operand.example(sizes, library.device)
                    assert (example.shape, example.stride(), example.dtype) == (
                        weight.shape,
                        weight.stride(),
                        weight.dtype,
                    )


def test_sizes_may_be_expressions() -> None:
    operand = Operand("side", "bool", ("B", "1", "T", "L"), ("L*T", "L*T", "L", "1"))
    example = operand.example({"B": 3, "T": 5, "L": 16}, torch.device("cpu"))
    assert (example.shape, example.stride(), example.dtype) == (
        (3, 1, 5, 16),
        (80, 80, 16, 1),
        torch.bool,
    )
    assert operand.axes() == {0: "batch", 2: "tokens", 3: "length"}
    assert Operand("side", "float32", ("B*T", "8"), ("8", "1")).axes() == {}
    folded = Operand("side", "float32", ("4*B", "1", "L"), ("L", "L", "1"))
    assert folded.axes() == {0: "4*batch", 2: "length"}


# ------------------------------------------------------------------------------------- fingerprints


def _outlined(scales: tuple[float, ...] = (0.5, 0.5, 0.25)) -> GraphModule:
    return library_pipeline().run(flat(scales)).graph_module


def _fingerprints(gm: GraphModule) -> dict[str, str]:
    return {name: body.fingerprint for name, body in read_symbols(gm, ()).bodies.items()}


def _operator(body: GraphModule) -> None:
    body.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0].target = aten.sub.Tensor


def _literal(body: GraphModule) -> None:
    multiply = body.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[0]
    multiply.args = (multiply.args[0], 0.5 + 1e-12)


def _wiring(body: GraphModule) -> None:
    add = body.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    add.args = (add.args[1], add.args[0])


def _dtype(body: GraphModule) -> None:
    weight = body.graph.find_nodes(op="placeholder")[-1]
    weight.meta["val"] = weight.meta["val"].to(torch.float64)


def _size(body: GraphModule) -> None:
    weight = body.graph.find_nodes(op="placeholder")[-1]
    weight.meta["val"] = torch.empty(4, 5, device="meta")


def _layout(body: GraphModule) -> None:
    weight = body.graph.find_nodes(op="placeholder")[-1]
    weight.meta["val"] = weight.meta["val"].t()


CHANGES = (_operator, _literal, _wiring, _dtype, _size, _layout)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_whatever_changes_a_body_changes_its_fingerprint_alone(
    change: Callable[[GraphModule], None],
) -> None:
    before, gm = _fingerprints(_outlined()), _outlined()
    body = gm.get_submodule("layer_kind_0")
    assert isinstance(body, GraphModule)
    change(body)
    after = _fingerprints(gm)
    assert {name for name in before if before[name] != after[name]} == {"layer_kind_0"}
    assert len(set(before.values())) == len(before)


def test_names_and_other_layers_do_not_enter_a_fingerprint() -> None:
    gm = _outlined()
    body = gm.get_submodule("layer_kind_0")
    assert isinstance(body, GraphModule)
    for node in body.graph.nodes:
        node.name = f"other_{node.name}"
    assert _fingerprints(gm) == _fingerprints(_outlined())
    assert (
        _fingerprints(_outlined((0.5,)))["layer_kind_0"]
        == _fingerprints(_outlined())["layer_kind_0"]
    )


def test_a_library_is_fingerprinted_with_its_wiring() -> None:
    libraries = [
        LayerLibrary(CapturedModel(flat(scales), 3, (), "", 0.0))
        for scales in ((0.5, 0.5, 0.25), (0.5, 0.25, 0.5))
    ]
    assert _fingerprints(libraries[0].graph_module) == _fingerprints(libraries[1].graph_module)
    assert libraries[0].fingerprint != libraries[1].fingerprint


# --------------------------------------------------------------------------- a library by its table


class _Capture:
    """Hands out a family's capture, and counts how often."""

    def __init__(self, family: str) -> None:
        self.family, self.calls = family, 0

    def __call__(self) -> CapturedModel:
        self.calls += 1
        return tiny(self.family).captured


def _by_table(family: str, capture: _Capture) -> LayerLibrary:
    known = tiny(family).library
    table = SymbolTable.from_json(known.table.to_json())
    return LayerLibrary.from_table(table, known.tensors, capture=capture)


@each_family
def test_a_library_by_its_table_traces_only_when_its_graphs_are_asked_for(family: str) -> None:
    known, capture = tiny(family).library, _Capture(family)
    library = _by_table(family, capture)
    program = Program.from_path((0, 2, 2, 3), 4)
    assert (library.depth, library.device, library.dtype) == (
        known.depth,
        known.device,
        known.dtype,
    )
    assert library.fingerprint == known.fingerprint and library.kv_specs(program) == known.kv_specs(
        program
    )
    for mine, theirs in zip(
        (library.prologue, *library.layers), (known.prologue, *known.layers), strict=True
    ):
        assert (mine.target, mine.sides) == (theirs.target, theirs.sides)
        assert all(
            a.data_ptr() == b.data_ptr() for a, b in zip(mine.weights, theirs.weights, strict=True)
        )
    assert not library.is_traced and capture.calls == 0
    assert library.bodies.keys() == known.bodies.keys()
    assert library.is_traced and capture.calls == 1


@each_family
def test_a_library_by_its_table_computes_the_same_bits(family: str) -> None:
    known, capture = tiny(family).library, _Capture(family)
    program, ids = Program.from_path((0, 2, 2, 3), 4), torch.stack(prompts(5, 5))
    results = []
    for library in (known, _by_table(family, capture)):
        slots = make_slots(library, program, batch=2, length=16)
        logits = library.interpret(
            program, ids, torch.arange(5).expand(2, -1), torch.arange(16), slots
        )
        results.append([logits, *(t for pair in slots for t in pair)])
    assert capture.calls == 1 and results[0][0].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_table_of_another_graph_is_an_error_once_the_graphs_are_there() -> None:
    known = tiny("llama").library
    name = known.layers[0].target
    body = dataclasses.replace(known.table.bodies[name], fingerprint="0" * 64)
    table = dataclasses.replace(known.table, bodies={**known.table.bodies, name: body})
    library = LayerLibrary.from_table(table, known.tensors, capture=_Capture("llama"))
    for _ in range(2):
        with pytest.raises(
            CaptureError,
            match=r"its cached symbol table was made from \(line \d+ was .*\); run .* cache clear",
        ):
            _ = library.graph_module


def test_a_table_that_names_tensors_the_model_lacks_is_a_key_error() -> None:
    known = tiny("llama").library
    with pytest.raises(KeyError, match="lm_head"):
        LayerLibrary.from_table(
            known.table,
            {n: t for n, t in known.tensors.items() if "lm_head" not in n},
            capture=_Capture("llama"),
        )
