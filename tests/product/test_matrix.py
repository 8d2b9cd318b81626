"""The matrix of versions: which pairs it tries, what it leaves out, and how it tells the result."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import matrix
from matrix import (
    counts,
    edge_pairs,
    newest_of_each_minor,
    other_requirements,
    still_to_do,
    table,
    with_result,
)

REPORT = """<testsuites><testsuite>
  <testcase classname="tests.test_a" name="test_one[llama]"/>
  <testcase classname="tests.test_a" name="test_two"><failure message="no"/></testcase>
  <testcase classname="tests.test_b" name="test_three"><error message="no"/></testcase>
  <testcase classname="tests.test_b" name="test_four"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def _result(torch: str, transformers: str, **more: Any) -> dict[str, Any]:
    return {
        "torch": torch,
        "transformers": transformers,
        "passed": 9,
        "failed": 0,
        "skipped": 0,
        "failures": [],
        **more,
    }


def test_the_newest_patch_of_each_minor_version_is_tried() -> None:
    versions = [
        "2.13.0+cpu",
        "2.14.0",
        "2.14.1",
        "2.11.0",
        "2.13.0",
        "2.10.0",
        "1.13.1",
        "2.15.0rc1",
    ]
    assert newest_of_each_minor(versions) == ["2.11.0", "2.13.0", "2.14.1"]


def test_the_edges_are_tried_and_each_pair_once() -> None:
    pairs = edge_pairs(["2.11.0", "2.12.1", "2.13.0"], ["5.17.0", "5.20.0", "5.24.0"])
    oldest, newest = [("2.11.0", "5.17.0")], [("2.13.0", "5.24.0")]
    each_transformers = [("2.13.0", "5.17.0"), ("2.13.0", "5.20.0")]
    each_torch = [("2.12.1", "5.24.0"), ("2.11.0", "5.24.0")]
    assert pairs == oldest + newest + each_transformers + each_torch
    assert edge_pairs(["2.11.0"], ["5.17.0"]) == oldest


def test_what_was_measured_is_not_measured_again_but_what_did_not_run_is() -> None:
    done, broken, new = ("2.11.0", "5.17.0"), ("2.12.1", "5.24.0"), ("2.13.0", "5.24.0")
    results = [
        _result(*done, failed=3),
        {"torch": broken[0], "transformers": broken[1], "error": "no space left"},
    ]
    assert still_to_do([done, broken, new], results) == [broken, new]
    assert still_to_do([done], results, wheel=True) == [done]
    on_wheel = [_result(*done, wheel=True)]
    assert still_to_do([done], on_wheel) == still_to_do([done], on_wheel, wheel=True) == []


def test_a_new_result_takes_the_place_of_the_old_one_and_versions_stay_in_order() -> None:
    results: list[dict[str, Any]] = []
    for torch in ("2.13.0", "2.9.0", "2.11.0", "2.13.0"):
        results = with_result(results, _result(torch, "5.24.0", passed=len(results)))
    assert [(r["torch"], r["passed"]) for r in results] == [
        ("2.9.0", 1),
        ("2.11.0", 2),
        ("2.13.0", 3),
    ]


def test_a_report_of_pytest_is_counted() -> None:
    failures = ["test_a::test_two", "test_b::test_three"]
    assert counts(REPORT) == {"passed": 1, "failed": 2, "skipped": 1, "failures": failures}


def test_the_table_has_a_row_a_torch_and_names_what_failed() -> None:
    results = [
        _result("2.9.0", "5.24.0", skipped=2),
        _result("2.11.0", "5.17.0", failed=1, failures=["test_a::test_two"]),
        {"torch": "2.11.0", "transformers": "5.24.0", "error": "no space left"},
    ]
    text = table(results)
    assert "| torch | transformers 5.17.0 | transformers 5.24.0 |" in text
    assert (
        "| 2.9.0 | – | 9 passed, 2 skipped |\n| 2.11.0 | **1 failed**, 9 passed | did not run |"
        in text
    )
    assert "torch 2.11.0 with transformers 5.17.0:\n\n- `test_a::test_two`" in text
    assert "torch 2.11.0 with transformers 5.24.0:\n\n- no space left" in text


def test_the_table_tells_which_pairs_ran_on_a_wheel() -> None:
    text = table([_result("2.9.0", "5.24.0", wheel=True), _result("2.11.0", "5.24.0", wheel=False)])
    assert "| 2.9.0 | 9 passed (a wheel) |\n| 2.11.0 | 9 passed |" in text


def test_tests_of_a_wheel_have_no_package_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        if "wheel" in command:  # from sources that are whole
            assert (Path(command[-1]) / "polar_fx" / "__init__.py").exists()
            assert (Path(command[-1]) / "polar_fx" / "passes").exists()
            (Path(command[command.index("--wheel-dir") + 1]) / "polar_fx.whl").touch()

    monkeypatch.setattr(matrix, "_run", run)
    matrix.installed_from_wheel(Path("python"), tmp_path / "place")
    assert [command[-1].endswith("polar_fx.whl") for command in commands] == [False, True, False]
    assert "-P" in commands[-1]  # the package that is found is looked at last
    for package in ("polar_fx", "passes"):
        assert not (tmp_path / "place" / package).exists()
    assert (tmp_path / "place" / "tests" / "product" / "test_matrix.py").exists()


@pytest.mark.parametrize("wheel", [False, True])
def test_tests_run_where_the_package_is_wanted(
    wheel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str], **_: Any) -> Any:
        assert env["PYTHONPATH"] == str(cwd)
        places.append(cwd)
        (tmp_path / "pair.xml").write_text(REPORT, encoding="utf-8")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(matrix, "build", lambda folder, pair: Path("python"))
    monkeypatch.setattr(matrix, "installed_from_wheel", lambda python, place: places.append(place))
    monkeypatch.setattr(matrix, "_commit", lambda: "abc")
    monkeypatch.setattr(subprocess, "run", run)
    pair = ("2.15.0", "5.24.0")
    result = matrix.measure(pair, tmp_path / "pair", jobs=1, minutes=1, wheel=wheel)
    assert result["failed"] == 2 and result["wheel"] is wheel
    assert (places[0] == places[-1] != matrix.ROOT) if wheel else places == [matrix.ROOT]


def test_the_pair_itself_is_not_among_the_other_requirements() -> None:
    names = other_requirements()
    assert not [name for name in names if name.startswith(("torch", "transformers"))]
    assert "pytest" in names and any(name.startswith("safetensors") for name in names)


def test_the_tests_it_runs_exist() -> None:
    for one in matrix.SUBSET:
        file, _, name = one.partition("::")
        text = (matrix.ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, one
    families = (matrix.ROOT / "tests/product/test_families.py").read_text(encoding="utf-8")
    refused = families.partition("\nREFUSED")[2].partition("\n}\n")[0]
    assert all(f'"{family}": (' in refused for family in matrix.REFUSED)


def test_the_table_in_the_docs_is_that_of_the_results() -> None:
    assert matrix.TABLE.read_text(encoding="utf-8") == table(matrix.load(matrix.RESULTS))


def test_a_pair_that_was_measured_needs_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(matrix, "TABLE", tmp_path / "versions.md")
    monkeypatch.setattr(matrix, "measure", lambda pair, *_, **__: _result(*pair))
    arguments = ["--folder", str(tmp_path / "environments"), "--pair", "2.13.0:5.24.0"]
    matrix.main(arguments)
    assert matrix.load(matrix.RESULTS) == [_result("2.13.0", "5.24.0")] and matrix.TABLE.exists()
    monkeypatch.setattr(matrix, "measure", lambda *_, **__: pytest.fail("measured again"))
    matrix.main(arguments)


@pytest.mark.parametrize("pair", ["2.13.0", "2.13:5.24.0", "newest:newest"])
def test_a_pair_that_is_none_is_refused(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--pair", pair])
    assert (
        "a pair is two versions of three numbers, as in --pair 2.13.0:5.24.0"
        in capsys.readouterr().err
    )
