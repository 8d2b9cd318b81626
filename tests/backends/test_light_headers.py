"""The lighter <regex> of regions: it reads names of devices as the usual one does, only regions get
it, and only where torch asks for no more.
"""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from polar_fx.backends import light_headers as module
from polar_fx.backends.aot_inductor import REGION, AotInductorBackend
from polar_fx.backends.light_headers import FOLDER, are_enough, asks_for_more, light_headers

_PROGRAM = """
#include <regex>
#include <iostream>
#include <string>

int main() {
  std::string name;
  while (std::getline(std::cin, name)) {
    std::regex re("(cpu|cuda|xpu|mps)(:([0-9]+))?");
    std::smatch sm;
    bool matched = std::regex_match(name, sm, re);
    std::cout << matched;
    for (int i = 0; matched && i < 4; ++i) {
      std::cout << ' ' << sm[i].matched << '=' << sm[i].str();
    }
    std::cout << '\\n';
  }
}
"""
_NAMES = (
    *("cpu", "cuda", "xpu", "mps", "cuda:0", "cuda:17", "cpu:3", "mps:00"),
    *("", ":", "cuda:", "cuda:-1", "cuda: 1", "cuda:1a", "cuda:1:2", "gpu", "CPU", "cpux", " cpu"),
)
_AS_REGIONS = ("-DTORCH_INDUCTOR_CPP_WRAPPER", "-DSTANDALONE_TORCH_HEADER")


def _compile(folder: Path, *flags: str) -> Path:
    if (compiler := shutil.which(get_cpp_compiler())) is None:
        pytest.skip("no C++ compiler is installed")
    source, program = folder / "names.cpp", folder / "names"
    source.write_text(_PROGRAM)
    given = ("-std=c++20", "-Wall", "-Werror", "-pedantic", *flags)
    with light_headers():
        subprocess.run([compiler, *given, str(source), "-o", str(program)], check=True)
    return program


def _says(program: Path) -> str:
    asked = "".join(f"{name}\n" for name in _NAMES)
    return subprocess.run([program], input=asked, capture_output=True, text=True, check=True).stdout


def test_names_are_read_as_by_the_usual_one(tmp_path: Path) -> None:
    folders = tmp_path / "usual", tmp_path / "lighter"
    for folder in folders:
        folder.mkdir()
    usual, lighter = _compile(folders[0]), _compile(folders[1], *_AS_REGIONS)
    assert b"basic_regex" in usual.read_bytes(), "other code gets the usual header"
    assert b"basic_regex" not in lighter.read_bytes()
    assert _says(lighter) == _says(usual)
    assert sum(line.startswith("1") for line in _says(usual).splitlines()) == 8


def test_regions_hold_none_of_the_usual_one(tmp_path: Path) -> None:
    assert are_enough(), "docs/versions.md names the versions of torch that are supported"
    layer = torch.fx.symbolic_trace(torch.nn.ReLU())
    backend, example = AotInductorBackend(), (torch.ones(3),)
    backend.export(layer, example, ({},), tmp_path)
    backend.build(tmp_path)
    with zipfile.ZipFile(tmp_path / REGION) as package:
        code = [package.read(n) for n in package.namelist() if n.endswith(".so")]
    assert code and not any(b"basic_regex" in each for each in code)
    (got,) = backend.load({REGION: tmp_path / REGION})([-torch.ones(3)])
    assert torch.equal(got, torch.zeros(3))
    assert str(FOLDER) not in os.environ.get("CPLUS_INCLUDE_PATH", "")


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ("std::smatch sm;", False),
        ('if (sm[1].str() == "xpu" || sm[3].matched) {', False),
        ('std::regex_replace(name, re, "");', True),
        ("std::smatch found;", True),
        ("std::cmatch sm;", True),
        ("if (sm.size() > 1) {", True),
        ("if (sm[2].length() > 1) {", True),
    ],
)
def test_what_is_asked_of_it_is_read_from_the_headers(
    tmp_path: Path, line: str, more: bool
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "some.h").write_text(f"#include <regex>\n  {line}\n")
    assert asks_for_more(tmp_path) == more


def test_a_runtime_that_asks_for_more_gets_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "are_enough", lambda: False)
    with light_headers():
        assert str(FOLDER) not in os.environ.get("CPLUS_INCLUDE_PATH", "")


@pytest.mark.parametrize("before", [None, "some/where"])
def test_folders_that_are_searched_already_still_are(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Also while threads compile at the same time, whichever is ready first."""
    monkeypatch.setattr(module, "are_enough", lambda: True)
    if before is None:
        monkeypatch.delenv("CPLUS_INCLUDE_PATH", raising=False)
    else:
        monkeypatch.setenv("CPLUS_INCLUDE_PATH", before)
    first, second = light_headers(), light_headers()
    first.__enter__()
    second.__enter__()
    both = os.environ["CPLUS_INCLUDE_PATH"]
    first.__exit__(None, None, None)
    assert (
        both
        == os.environ["CPLUS_INCLUDE_PATH"]
        == os.pathsep.join([str(FOLDER), *filter(None, (before,))])
    )
    second.__exit__(None, None, None)
    assert os.environ.get("CPLUS_INCLUDE_PATH") == before
