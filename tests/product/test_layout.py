"""The shape of the tree: nothing imports upward, files stay small, no model family is known by
name.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from places import ROOT

SOURCES = sorted(
    p
    for top in ("polar_fx", "passes", "bench", "tests")
    for p in (ROOT / top).rglob("*.py")
    if "polar_fx/passes" not in str(p)
)
LIBRARY = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("polar_fx", "passes")]

# Each room may import from rooms in earlier lines, from its own line and from itself.
ORDER = (
    {"errors", "environment", "version"},
    {"child_process", "output", "huge_pages"},
    {"hub"},
    {"passes", "program"},
    {"capture", "store", "stats", "region_names"},
    {"quantized"},
    {"models"},
    {"library"},
    {"backends"},
    {"predictor"},
    {"runtime"},
    {"engine", "explain"},
    {"compiled"},
    {"questions"},
    {"judge"},
    {"search"},
    {"training"},
    {"evaluation"},
    {"bundle"},
    {"graph_files"},
    {"loading"},
    {"jobs"},
    {"lm_harness", "serving"},
    {"cli"},
    {"__main__"},
)
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
# The same inside large rooms: a module or folder may import from those before it.
INNER = {
    "runtime": (
        "uncopied",
        "model_info",
        "on_device",
        "token_rows",
        "bound_weights",
        "code_key",
        "compiled_before",
        "kv_cache",
        "regions",
        "link",
        "graph_api",
        "graph_cache",
        "cuda_graphs",
        "tiers",
        "row_length",
        "kv_store",
        "kv_windows",
        "kv_rows",
        "kv_prefixes",
        "lockstep_order",
        "lockstep_plan",
        "lockstep_rows",
        "lockstep_graphs",
        "lockstep",
        "lockstep_session",
        "group_session",
        "runner",
        "as_transformers",
        "checked_runs",
        "trunk",
        "unguided",
        "generation_settings",
        "greedy",
        "generator",
        "conversation",
        "dispatcher",
    ),
    "search": ("config", "methods", "records", "analysis", "lockstep", "workers", "ray_workers"),
}


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "passes" else parts[1]


def _imported(path: Path) -> set[tuple[str, ...]]:
    """Modules and names of polar_fx that this file imports, type-checking imports included, as
    ("search", "records", ...).
    """
    parts = path.relative_to(ROOT).parts[:-1]
    package = ("polar_fx", *parts) if parts[0] == "passes" else parts
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    return {name[1:] for name in found if name[0] == "polar_fx" and len(name) > 1}


def _imported_rooms(path: Path) -> set[str]:
    return {name[0] for name in _imported(path)} & RANK.keys()


@pytest.mark.parametrize(
    "path", [p for p in LIBRARY if _room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_imports_upward(path: Path) -> None:
    room = _room(path)
    assert room in RANK, f"{room} has no place in ORDER; give it one"
    upward = {r for r in _imported_rooms(path) if RANK[r] > RANK[room]}
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_no_rooms_import_each_other_in_a_circle() -> None:
    """Rooms on one line of ORDER might; type-checking imports count."""
    imports: dict[str, set[str]] = {}
    for path in LIBRARY:
        if (room := _room(path)) != "__init__":
            imports.setdefault(room, set()).update(_imported_rooms(path) - {room})
    order = tuple(TopologicalSorter(imports).static_order())  # raises CycleError
    assert order.index("runtime") < order.index("compiled") < order.index("cli")


@pytest.mark.parametrize(
    "path", [p for p in LIBRARY if _room(p) in INNER], ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_imports_upward_inside_a_room(path: Path) -> None:
    room, part = path.relative_to(ROOT).with_suffix("").parts[1:3]
    if part == "__init__":
        return
    order = INNER[room]
    assert part in order, f"{room}/{part} has no place in INNER; give it one"
    reached = {name[1] for name in _imported(path) if name[0] == room and len(name) > 1} & set(
        order
    )
    upward = {other for other in reached if order.index(other) > order.index(part)}
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_the_import_reader_reads() -> None:
    """The tests above would pass if it saw nothing."""
    assert {"library", "runtime", "program", "models"} <= _imported_rooms(
        ROOT / "polar_fx" / "compiled.py"
    )
    assert "errors" in _imported_rooms(ROOT / "polar_fx" / "capture" / "trace.py")
    assert ("runtime", "regions", "RegionTable") in _imported(
        ROOT / "polar_fx" / "runtime" / "link.py"
    )
    # for type checking only
    assert "compiled" in _imported_rooms(ROOT / "polar_fx" / "evaluation" / "block_influence.py")


@pytest.mark.parametrize("path", [p for p in LIBRARY if _room(p) == "passes"], ids=lambda p: p.name)
def test_passes_import_torch_fx_and_the_standard_library_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {
        str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
    }
    assert not {m for m in modules if m.split(".")[0] in ("transformers", "polar_fx", "numpy")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_and_well_named(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_short(path: Path) -> None:
    """At most 60 lines, the docstring aside: what a reader has to keep in mind at once."""
    name = path.relative_to(ROOT).as_posix()
    lengths = _function_lengths(path.read_text(encoding="utf-8"))
    long = [f"{function} has {length} lines" for function, length in lengths if length > 60]
    assert not long, f"{name}: {', '.join(long)}; cut it where its parts do different things"


def _function_lengths(source: str) -> list[tuple[str, int]]:
    """Lines of each function, inner ones included, from `def` to its end without the docstring."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = _lines(node)
            if ast.get_docstring(node) is not None:
                lines -= _lines(node.body[0])
            found.append((node.name, lines))
    return found


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_function_lengths_are_counted() -> None:
    """The test above would pass if it saw nothing."""
    source = (
        "class A:\n"
        "    @property\n"
        "    def one(self):\n"
        '        """First.\n\n'
        '        Second.\n        """\n'
        "        def inner():\n"
        "            pass\n\n"
        "        return inner\n"
        "async def two():\n"
        "    pass\n"
    )
    assert sorted(_function_lengths(source)) == [("inner", 2), ("one", 5), ("two", 2)]


FAMILIES = re.compile(
    r"llama|qwen|gemma|mistral|mixtral|\bphi|olmo|gpt|bloom|falcon|cohere|mamba|deepseek",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_names_a_model_family(path: Path) -> None:
    found = FAMILIES.findall(path.read_text(encoding="utf-8"))
    assert not found, f"{path.relative_to(ROOT)} names {found}"


def test_one_place_reads_the_environment() -> None:
    readers = {
        p.name for p in LIBRARY if re.search(r"os\.environ|getenv", p.read_text(encoding="utf-8"))
    }
    assert readers == {"environment.py"}
