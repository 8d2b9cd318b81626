"""Calls that say what they hand over: arguments beyond two are taken by keyword."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from places import ROOT

SOURCES = sorted(
    p
    for top in ("polar_fx", "passes", "bench", "tests")
    for p in (ROOT / top).rglob("*.py")
    if "polar_fx/passes" not in str(p)
)

PUBLIC = "public: callers may give these by position"
METHOD = "a search method, which the registry and callers take as one kind of function"
CALLED = "handed on as a function that is called by position"

# By file and qualified name, with the reason.
BY_POSITION = {
    ("polar_fx/region_names.py", "ShapeClass.of"): PUBLIC,
    ("polar_fx/bundle/writer.py", "export"): PUBLIC,
    ("polar_fx/compiled.py", "CompiledModel.decode"): PUBLIC,
    ("polar_fx/compiled.py", "CompiledModel.dispatch_by"): PUBLIC,
    ("polar_fx/compiled.py", "CompiledModel.prefill"): PUBLIC,
    ("polar_fx/engine/engine.py", "Engine.add"): PUBLIC,
    ("polar_fx/library/library.py", "LayerLibrary.interpret"): PUBLIC,
    ("polar_fx/lm_harness/local_task.py", "local_task"): PUBLIC,
    ("polar_fx/loading.py", "load"): PUBLIC,
    ("polar_fx/program/program.py", "Program.from_encoding"): PUBLIC,
    ("polar_fx/program/program.py", "Program.repeat"): PUBLIC,
    ("polar_fx/questions/tasks.py", "generate"): PUBLIC,
    ("polar_fx/search/lockstep.py", "run_searches"): PUBLIC,
    ("polar_fx/search/methods/beam.py", "beam"): METHOD,
    ("polar_fx/search/methods/evolution.py", "evolution"): METHOD,
    ("polar_fx/search/methods/mcts.py", "mcts"): METHOD,
    ("polar_fx/search/methods/scan.py", "random_search"): METHOD,
    ("polar_fx/search/methods/scan.py", "scan"): METHOD,
    ("bench/fuzz_calls.py", "Judge.of_logits"): CALLED,
    ("bench/fuzz_calls.py", "Judge.of_score"): CALLED,
    ("bench/fuzz_calls.py", "Judge.of_tokens"): CALLED,
    ("passes/attention_over_blocks.py", "_"): CALLED,
    ("passes/grouped_linear.py", "_"): CALLED,
    ("passes/linear_to_onednn.py", "_"): CALLED,
    ("passes/linear_to_row_kernel.py", "_"): CALLED,
    ("passes/quantized_linear.py", "dequantize"): CALLED,
    ("polar_fx/backends/grouped_kernel.py", "register._"): CALLED,
    ("polar_fx/backends/onednn_linear.py", "register._"): CALLED,
    ("polar_fx/backends/quantized_kernel.py", "register._"): CALLED,
    ("polar_fx/backends/row_kernel.py", "register._"): CALLED,
    ("polar_fx/backends/block_attention.py", "register._"): CALLED,
    ("polar_fx/capture/recurrences.py", "Recurrences.channel_delta_rule"): CALLED,
    ("polar_fx/capture/recurrences.py", "Recurrences.gated_delta_rule"): CALLED,
    ("polar_fx/capture/recurrences.py", "Recurrences.selective_scan"): CALLED,
    ("polar_fx/capture/recurrences.py", "Recurrences.state_space_scan"): CALLED,
    ("polar_fx/graph_files/onnx_graphs.py", "_Links.lerp"): CALLED,
    ("polar_fx/runtime/runner.py", "Runner._prefill_batch.run"): CALLED,
    ("polar_fx/runtime/runner.py", "Runner.prefill.run"): CALLED,
    ("polar_fx/search/records/formats.py", "import_official.record"): CALLED,
    ("polar_fx/search/records/formats.py", "import_re_polar.record"): CALLED,
    ("tests/graph_files/test_onnx_files.py", "Session.interpret"): CALLED,
    ("tests/support/plain_loop.py", "_Blends.after"): CALLED,
    ("tests/support/plain_loop.py", "_Blends.before"): CALLED,
    ("tests/training/test_pipeline.py", "World.dense"): CALLED,
}

# Methods whose callers are torch, transformers, TensorBoard, or whoever writes a backend.
DICTATED = {
    "add_scalar",
    "compile_region",
    "export",
    "forward",
    "prepare_inputs_for_generation",
    "update",
    "update_conv_state",
    "update_recurrent_state",
}


@dataclass(frozen=True)
class Function:
    """One definition; `name` is qualified, `num_positional` leaves self and cls out."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None
    num_positional: int

    def is_dictated(self, values: set[str]) -> bool:
        """Whether somebody else says what its arguments are: pytest, Python, torch, pickle, or
        whoever is handed the function (`values`: names that its file uses as values).
        """
        own = self.node.name
        marks = {ast.unparse(mark).partition("(")[0] for mark in self.node.decorator_list}
        if own.startswith(("test_", "pytest_")) or marks & {"pytest.fixture", "given", "overload"}:
            return True
        if own.startswith("__") and own not in ("__init__", "__call__"):
            return True
        if self.owner is not None and (own in DICTATED or self.owner.name.endswith("Error")):
            return True
        return own in values or self.node.args.vararg is not None


def functions(
    node: ast.AST, owner: ast.ClassDef | None = None, *, path: str = ""
) -> Iterator[Function]:
    """All definitions below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from functions(child, child, path=f"{path}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = {ast.unparse(mark) for mark in child.decorator_list}
            is_bound = owner is not None and "staticmethod" not in marks
            count = len(child.args.posonlyargs) + len(child.args.args) - is_bound
            yield Function(path + child.name, child, owner, count)
            yield from functions(child, path=f"{path}{child.name}.")
        else:
            yield from functions(child, owner, path=path)


def names_as_values(tree: ast.AST) -> set[str]:
    """Names of functions and own methods that are used without being called."""
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    loaded, stored, methods = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            stored.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.add(node.id)
        elif isinstance(node, ast.Name) and id(node) not in called:
            loaded.add(node.id)
        elif isinstance(node, ast.Attribute) and id(node) not in called:
            of = ast.unparse(node.value)
            methods |= {node.attr} if of in ("self", "cls") else set()
    return (loaded - stored) | methods


def wide_functions(source: str) -> list[str]:
    """Functions of a file that take more than two arguments by position, without need."""
    tree = ast.parse(source)
    values = names_as_values(tree)
    wide = [f for f in functions(tree) if f.num_positional > 2]
    return [f.name for f in wide if not f.is_dictated(values)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arguments_beyond_two_are_taken_by_keyword(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    found = wide_functions(path.read_text(encoding="utf-8"))
    wide = [name for name in found if (file, name) not in BY_POSITION]
    assert not wide, f"{file}: {', '.join(wide)}; put * after the second argument"


def test_every_exemption_is_needed() -> None:
    found = set()
    for path in SOURCES:
        file = path.relative_to(ROOT).as_posix()
        found |= {(file, name) for name in wide_functions(path.read_text(encoding="utf-8"))}
    assert not BY_POSITION.keys() - found


def test_wide_functions_are_seen() -> None:
    """The tests above would pass if it saw nothing."""
    source = (
        "class A:\n"
        "    def two(self, a, b, *, c): ...\n"
        "    def three(self, a, b, c): ...\n"
        "    @staticmethod\n"
        "    def static(a, b, c): ...\n"
        "    def __exit__(self, a, b, c): ...\n"
        "class MyError(Exception):\n"
        "    def __init__(self, a, b, c): ...\n"
        "def outer(a):\n"
        "    def inner(a, b, c): ...\n"
        "    def handed(a, b, c): ...\n"
        "    return handed\n"
        "async def wide(a, b, c=1): ...\n"
        "def test_it(a, b, c): ...\n"
    )
    assert wide_functions(source) == ["A.three", "A.static", "outer.inner", "wide"]
