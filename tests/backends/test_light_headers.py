"""The lighter <regex> of regions: it reads names of devices as the usual one does, only regions get
it, and only where torch asks for no more.
"""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from polar_fx.backends import light_headers
from polar_fx.backends.aot_inductor import REGION, AotInductorBackend
from polar_fx.backends.light_headers import are_enough, uses_of_regex

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
    source, program = folder / "names.cpp", folder / "names"
    source.write_text(_PROGRAM)
    given = ("-std=c++20", "-Wall", "-Werror", "-pedantic", *flags)
    with light_headers.light_headers():
        subprocess.run(["g++", *given, str(source), "-o", str(program)], check=True)
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
    assert str(light_headers.FOLDER) not in os.environ.get("CPLUS_INCLUDE_PATH", "")


def test_a_runtime_that_asks_for_more_gets_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more.h").write_text('#include <regex>\nstd::regex_replace(name, re, "");\n')
    assert uses_of_regex(tmp_path) == {"#include <regex>", 'std::regex_replace(name, re, "");'}
    monkeypatch.setattr(light_headers, "are_enough", lambda: False)
    with light_headers.light_headers():
        assert str(light_headers.FOLDER) not in os.environ.get("CPLUS_INCLUDE_PATH", "")


def test_folders_that_are_searched_already_still_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(tmp_path))
    with light_headers.light_headers():
        searched = os.environ["CPLUS_INCLUDE_PATH"].split(os.pathsep)
        assert searched == [str(light_headers.FOLDER), str(tmp_path)]
    assert os.environ["CPLUS_INCLUDE_PATH"] == str(tmp_path)
