"""The shape of the tree: nothing imports upward, files stay small, no model family is known by name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for top in ("polar_fx", "passes", "bench", "tests") for p in (ROOT / top).rglob("*.py") if "polar_fx/passes" not in str(p)
)
LIBRARY = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("polar_fx", "passes")]

# Each room may import from rooms in earlier lines, and from its own.
ORDER = (
    {"errors", "environment", "plain_text"},
    {"passes", "program", "program_parts", "program_picture", "program_segments", "program_text"},
    {"capture"},
    {"check", "kv_cache", "models", "store", "store_entry", "symbols"},
    {"library"},
    {"library_cache"},
    {"backends"},
    {"variant"},
    {"regions"},
    {"link"},
    {"cuda_graphs"},
    {"tiers"},
    {"explain", "report"},
    {"predictor"},
    {"trunk"},
    {"generate"},
    {"dispatch"},
    {"compiled"},
    {"evaluate"},
    {"search"},
    {"protocol"},
    {"training"},
    {"comparison"},
    {"bundle"},
    {"sources"},
    {"harness", "serving"},
    {"cli"},
    {"__main__"},
)
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "passes" else parts[1]


def _imported_rooms(path: Path) -> set[str]:
    """Rooms of polar_fx that run-time imports of this file reach; type-checking imports do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = (
        ("polar_fx", *path.relative_to(ROOT).parts[:-1])
        if path.relative_to(ROOT).parts[0] == "passes"
        else path.relative_to(ROOT).parts[:-1]
    )
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module.split(".") if node.module else ()))
            names = [full] if len(full) > 1 else [(*full, a.name) for a in node.names]
            found |= {n[1] for n in names if n[0] == "polar_fx" and len(n) > 1}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("polar_fx.")}
    return found & RANK.keys()


@pytest.mark.parametrize("path", [p for p in LIBRARY if _room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_upward(path: Path) -> None:
    room = _room(path)
    assert room in RANK, f"{room} has no place in ORDER; give it one"
    upward = {r for r in _imported_rooms(path) if RANK[r] > RANK[room]}
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_the_import_reader_reads() -> None:
    """The test above would pass if it saw nothing."""
    assert {"library", "link", "kv_cache", "program"} <= _imported_rooms(ROOT / "polar_fx" / "compiled.py")
    assert "errors" in _imported_rooms(ROOT / "polar_fx" / "capture" / "trace.py")


@pytest.mark.parametrize("path", [p for p in LIBRARY if _room(p) == "passes"], ids=lambda p: p.name)
def test_passes_import_torch_fx_and_the_standard_library_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not {m for m in modules if m.split(".")[0] in ("transformers", "polar_fx", "numpy")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_and_well_named(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


FAMILIES = re.compile(r"llama|qwen|gemma|mistral|mixtral|\bphi|olmo|gpt|bloom|falcon|cohere|mamba|deepseek", re.IGNORECASE)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_names_a_model_family(path: Path) -> None:
    found = FAMILIES.findall(path.read_text(encoding="utf-8"))
    assert not found, f"{path.relative_to(ROOT)} names {found}"


def test_one_place_reads_the_environment() -> None:
    readers = {p.name for p in LIBRARY if re.search(r"os\.environ|getenv", p.read_text(encoding="utf-8"))}
    assert readers == {"environment.py"}
