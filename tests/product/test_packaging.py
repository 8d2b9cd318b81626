"""The wheel holds each file once, and works away from the checkout; imports stay light. What a
release needs fits together: versions, classifiers, workflow, image.
"""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import version_check
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
DOCKERFILE = (ROOT / "docs" / "examples" / "Dockerfile").read_text(encoding="utf-8")


def _python(code: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )


def _built(kind: str, source: Path, *, out: Path) -> Path:
    """What setuptools makes of a source folder: an sdist or a wheel."""
    code = f"from setuptools import build_meta as m; print(m.build_{kind}({str(out)!r}))"
    done = _python(code, cwd=source)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # from a copy: building leaves files in the source folder
    copy = tmp_path_factory.mktemp("source") / "polar_fx"
    files = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.split("\0")
    for name in [f for f in files if f] or pytest.skip("not a git checkout"):
        target, source = copy / name, ROOT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.exists():
            target.write_bytes(source.read_bytes())
    return _built("sdist", copy, out=tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a release has it: of what the sdist holds."""
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.iterdir()
    return _built("wheel", source, out=tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_once(wheel: Path) -> None:
    names = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")]
    assert len(names) == len(set(names))
    here = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "polar_fx").rglob("*.py")
        if "polar_fx/passes" not in str(p)
    }
    here |= {f"polar_fx/passes/{p.name}" for p in (ROOT / "passes").glob("*.py")}
    assert set(names) == here


def test_the_wheel_holds_what_is_no_module(wheel: Path) -> None:
    """The mark of annotated packages, the sources of the C++ runner, a header for regions, the page
    of an evaluation and the names of packaged models, and the predictor in the box; nothing else.
    """
    names = {
        n
        for n in zipfile.ZipFile(wheel).namelist()
        if not n.endswith(".py") and ".dist-info/" not in n
    }
    runner = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "polar_fx" / "bundle" / "cpp").iterdir()
        if p.is_file()
    }
    others = {
        "polar_fx/py.typed",
        "polar_fx/backends/include/regex",
        "polar_fx/packaged_models.json",
        "polar_fx/evaluation/page.html",
        "polar_fx/serving/playground.html",
        "polar_fx/predictor/default/predictor.json",
        "polar_fx/predictor/default/predictor.safetensors",
    }
    assert runner and names == others | runner


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import polar_fx, polar_fx.passes as "
        "p, polar_fx.cli;print(polar_fx.__file__, p.__file__, sorted(p.PASSES)[0], "
        "polar_fx.Program.parse('skip 1', 3), polar_fx.compile)"
    )
    result = _python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path)) == 2 and "address-kv 0 2 /3" in result.stdout


def test_the_bare_name_passes_is_refused() -> None:
    result = _python("import passes")
    assert result.returncode == 1 and "polar_fx.passes" in result.stderr


def test_programs_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, polar_fx; polar_fx.Program.identity(3); print({'torch', 'transformers'} & "
        "set(sys.modules))"
    )
    assert _python(code).stdout.strip() == "set()"


def test_public_names_load_and_compile_is_the_function() -> None:
    code = (
        "import polar_fx, polar_fx.compiled\n"
        "for name in polar_fx.__all__: assert getattr(polar_fx, name) is not None, name\n"
        "assert callable(polar_fx.compile) and set(polar_fx.__all__) <= set(dir(polar_fx))"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert "no attribute 'compil'" in _python("import polar_fx; polar_fx.compil").stderr


def test_versions_agree_and_a_tag_is_held_against_them() -> None:
    assert version_check.problems() == []
    version = PROJECT["version"]
    assert any("the tag is 'v9.9'" in line for line in version_check.problems("v9.9"))
    told = [line for line in version_check.problems(f"v{version}") if "CHANGELOG" not in line]
    assert told == []


def test_classifiers_are_what_was_tried() -> None:
    tried = json.loads((ROOT / "bench" / "results" / "versions-cpu.json").read_text())["pairs"]
    pythons = {".".join(pair["python"].split(".")[:2]) for pair in tried}
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert set(named) == pythons


def test_the_release_workflow_runs_targets_that_are_there() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    targets = {target for line in commands for target in re.findall(r"make (\w+)", line)}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == {"check", "docs", "package"}
    assert all(f"\n{target}: " in makefile for target in targets)
    assert any("version_check.py" in line for line in commands)
    publish = jobs["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}


def test_the_image_copies_what_is_there() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert {"pyproject.toml", "README.md", "LICENSE", "polar_fx", "passes"} == set(names)
    assert all((ROOT / name).exists() for name in names)
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert torch and f"ARG TORCH={torch[1]}" in DOCKERFILE
