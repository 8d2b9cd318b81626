"""The wheel holds each file once, and works away from the checkout; imports stay light."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from places import ROOT


def _python(code: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
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
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


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
    """The mark of annotated packages, the sources of the C++ runner, the page of an evaluation and
    the names of packaged models, and the predictor in the box; nothing else.
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
