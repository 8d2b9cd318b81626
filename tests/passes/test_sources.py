"""Editing a source that shapes compiled code makes a new key; editing another does not."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.passes.attention_over_blocks import AttentionOverBlocks
from polar_fx.passes.attention_to_reduction import AttentionToReduction
from polar_fx.passes.sources import digest_of_files, module_digest, with_imports
from polar_fx.runtime.code_key import builder_sources

ROOT = Path(__file__).parents[2]
BACKENDS = {p.relative_to(ROOT / "polar_fx") for p in (ROOT / "polar_fx/backends").rglob("*.py")}
REGION = {
    *map(Path.as_posix, BACKENDS),
    "backends/include/regex",
    "library/symbols.py",
    "runtime/regions.py",
    "passes/base.py",
    "passes/joined_linears.py",
    "passes/keep_kv_writes.py",
    "passes/linear_to_onednn.py",
    "passes/linear_to_row_kernel.py",
    "passes/matvec_to_reduction.py",
    "passes/attention_to_reduction.py",
    "passes/attention_over_blocks.py",
    "passes/pipeline.py",
    "passes/quantized_linear.py",
    "passes/text.py",
}
OTHER = (
    "cli/run.py",
    "compiled.py",
    "judge/grading.py",
    "passes/dedupe_layers.py",
    "passes/schedule_layers.py",
    "runtime/code_key.py",
    "runtime/generator.py",
    "store/store.py",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, its passes as in a wheel, in another folder."""
    package = tmp_path_factory.mktemp("copy") / "polar_fx"
    shutil.copytree(ROOT / "polar_fx", package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def _builder(package: Path, kind: str = "region") -> str:
    return digest_of_files(builder_sources(kind, package), package)


def _changes(digest: Callable[[], str], file: Path) -> bool:
    """Whether one byte more in `file` changes the digest."""
    before, content = digest(), file.read_bytes()
    file.write_bytes(content + b"\n")
    try:
        return digest() != before
    finally:
        file.write_bytes(content)


def test_the_builder_is_the_same_wherever_it_is_installed(copy: Path) -> None:
    assert _builder(copy) == _builder(ROOT / "polar_fx")


@pytest.mark.parametrize("name", sorted(REGION))
def test_a_byte_of_what_shapes_regions_changes_the_builder(copy: Path, name: str) -> None:
    assert _changes(lambda: _builder(copy), copy / name)
    assert _changes(lambda: _builder(copy, "whole"), copy / name)


@pytest.mark.parametrize("name", OTHER)
def test_a_byte_elsewhere_does_not_change_the_builder(copy: Path, name: str) -> None:
    assert not _changes(lambda: _builder(copy), copy / name)


@pytest.mark.parametrize("name", ["runtime/tiers.py", "runtime/link.py", "program/program.py"])
def test_what_plans_whole_programs_changes_only_their_builder(copy: Path, name: str) -> None:
    assert _changes(lambda: _builder(copy, "whole"), copy / name)
    assert not _changes(lambda: _builder(copy), copy / name)


def test_steps_count_as_soon_as_they_have_a_file(copy: Path) -> None:
    steps, before = copy / "library/steps.py", _builder(copy)
    content = steps.read_bytes() if steps.exists() else None
    steps.write_bytes((content or b"") + b"\n")
    try:
        assert _builder(copy) != before
    finally:
        steps.unlink() if content is None else steps.write_bytes(content)


def test_contents_and_names_are_told_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "a.py", tmp_path / "b.py"
    one.write_text("x", encoding="utf-8")
    two.write_text("", encoding="utf-8")
    before = digest_of_files([one, two], tmp_path)
    assert digest_of_files([two, one], tmp_path) == before
    one.write_text("", encoding="utf-8")
    two.write_text("x", encoding="utf-8")
    assert digest_of_files([one, two], tmp_path) != before


def test_a_pass_counts_with_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from polar_fx.passes.text import structure_text\n"
        "def run():\n    import helper\n    import json, not_there\n",
        encoding="utf-8",
    )
    (tmp_path / "helper.py").write_text("import deeper\n", encoding="utf-8")
    (tmp_path / "deeper.py").write_text("import mine  # a circle\n", encoding="utf-8")
    (tmp_path / "stranger.py").write_text("", encoding="utf-8")

    def digest() -> str:
        module_digest.cache_clear()
        return module_digest(tmp_path / "mine.py")

    for name in ("mine.py", "helper.py", "deeper.py"):
        assert _changes(digest, tmp_path / name), name
    assert not _changes(digest, tmp_path / "stranger.py")
    folder = ROOT / "polar_fx/passes"
    found = with_imports([tmp_path / "mine.py"], (tmp_path, folder), passes=folder)
    names = {p.name for p in found}
    assert names == {"mine.py", "helper.py", "deeper.py", "text.py", "torch_types.py"}


def test_names_from_the_face_of_passes_count_with_all_that_it_imports(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.py", ROOT / "polar_fx/passes"
    mine.write_text("from polar_fx.passes import Pass, graph_fingerprint\n", encoding="utf-8")
    found = {p.name for p in with_imports([mine], (folder,), passes=folder)}
    assert {"mine.py", "__init__.py", "base.py", "text.py", "dedupe_layers.py"} <= found


_KEY = """
import torch
from polar_fx.backends import AotInductorBackend, ShapeClass
from polar_fx.runtime.code_key import VariantKey
key = VariantKey.of("region", "ab", shape=ShapeClass(1, 1, 64), backend=AotInductorBackend(),
                    device=torch.device("cpu"), dtype=torch.float32)
print(key.passes, key.builder)
"""


def _key(place: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _KEY],
        capture_output=True,
        text=True,
        check=True,
        cwd=place,
        env={"PYTHONPATH": str(place), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return done.stdout.split()


@pytest.mark.child_process
def test_a_byte_of_a_region_pass_makes_another_key(copy: Path) -> None:
    file = copy / "passes/attention_to_reduction.py"
    content, (passes, builder) = file.read_bytes(), _key(ROOT)
    assert _key(copy.parent) == [passes, builder], "the same code elsewhere"
    file.write_bytes(content + b"\n")
    try:
        edited = _key(copy.parent)
    finally:
        file.write_bytes(content)
    both = zip(passes.split("+"), edited[0].split("+"), strict=True)
    changed = [i for i, (before, after) in enumerate(both) if before != after]
    affected = (AttentionToReduction, AttentionOverBlocks)  # the latter imports the former
    assert changed == [i for i, p in enumerate(REGION_PASSES) if isinstance(p, affected)]
    assert edited[1] != builder


@pytest.mark.child_process
def test_a_pass_without_a_source_file_has_an_id_of_its_own_in_every_process() -> None:
    code = (
        "from polar_fx.passes.matvec_to_reduction import MatvecToReduction as M\n"
        "class Typed(M): pass\n"
        "assert Typed().content_id == Typed().content_id\n"
        "print(Typed().content_id)"
    )
    run = [sys.executable, "-c", code]
    ids = [
        subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(2)
    ]
    assert ids[0] != ids[1] and all(len(i.strip()) == 16 for i in ids)
