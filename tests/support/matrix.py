"""Which versions of torch and transformers work: `make matrix` tries pairs of them, each in an
environment of its own.

For every pair it builds a virtual environment, runs a part of the tests that takes a few minutes,
and notes what passed. After each pair the notes go to bench/results/versions-cpu.json and, as a
table, to docs/versions.md. A pair that is noted already is not run again (`--again` does), and an
environment that is whole is not built again.

Not every combination is tried. What breaks is nearly always something that one library changed, not
the combination, so the edges are enough: the oldest torch with the oldest transformers, every torch
with the newest transformers, and the newest torch with every transformers.

Only the standard library is used here: the script runs before anything is installed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "versions-cpu.json"
TABLE = ROOT / "docs" / "versions.md"

OLDEST_TORCH = (2, 11)  # the newest patch of every minor version from here on is tried
TRANSFORMERS = ("5.17.0", "5.20.0")  # and the newest

# Each kind of layer that traces differently: grouped heads, logit caps, sinks, ALiBi, latent
# attention with experts.
FAMILIES = ("llama", "gemma2", "gpt_oss", "bloom", "deepseek_v3")
# Models that are refused: what transformers itself raises for them changes from version to version.
REFUSED = ("rwkv", "gpt_neo")


def _of_families(test: str, families: Sequence[str]) -> list[str]:
    return [f"tests/product/test_families.py::{test}[{family}]" for family in families]


# Capture, families, forward and generate, compiled regions, bundles, passes.
SUBSET = (
    "tests/capture/test_captured.py",
    "tests/capture/test_row_values.py",
    "tests/backends/test_aot_inductor.py",
    "tests/backends/test_block_attention.py",
    "tests/backends/test_grouped_kernel.py",
    "tests/backends/test_kernels.py",
    "tests/backends/test_light_headers.py",
    "tests/backends/test_onednn_linear.py",
    "tests/backends/test_quantized_kernel.py",
    "tests/backends/test_row_kernel.py",
    *_of_families("test_identity_is_the_model", FAMILIES),
    "tests/product/test_families.py::test_rotary_frequencies_that_depend_on_the_length",
    "tests/product/test_families.py::test_rotary_frequencies_of_some_layers_that_depend_on_the_length",
    *_of_families("test_refused_with_reason_and_remedy", REFUSED),
    "tests/runtime/test_generator.py",
    "tests/runtime/test_regions.py",
    "tests/test_compiled.py::test_warmup_compiles_all_that_a_call_needs",
    "tests/test_compiled.py::test_any_batch_size_from_two_up_is_one_class",
    "tests/test_compiled.py::test_no_weight_is_copied",
    "tests/bundle/test_bundle.py::test_logits_are_those_of_the_compiled_model",
    "tests/bundle/test_bundle.py::test_generation_is_that_of_the_compiled_model",
    "tests/graph_files/test_program_file.py",
    "tests/passes/test_grouped_linear.py",
    "tests/passes/test_linear_to_row_kernel.py",
    "tests/passes/test_units.py",
    "tests/passes/test_reductions.py",
)
# What those tests need beside what the library needs.
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "accelerate", "setuptools")

Pair = tuple[str, str]  # versions of torch and transformers


class MatrixError(Exception):
    """A step of the matrix that failed; the message says which, and what to do."""


# -------------------------------------------------------------------------------------- which pairs


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def newest_of_each_minor(
    versions: Iterable[str], oldest: tuple[int, int] = OLDEST_TORCH
) -> list[str]:
    """The newest patch of every minor version from `oldest` on, oldest first; pre-releases and
    builds are left out.
    """
    newest: dict[tuple[int, ...], str] = {}
    for version in sorted((v for v in versions if re.fullmatch(r"\d+\.\d+\.\d+", v)), key=_number):
        if (minor := _number(version)[:2]) >= oldest:
            newest[minor] = version
    return list(newest.values())


def edge_pairs(torches: Sequence[str], transformers: Sequence[str]) -> list[Pair]:
    """The pairs at the edges, both lists given oldest first: what is likeliest to break comes
    first.
    """
    pairs = [(torches[0], transformers[0]), (torches[-1], transformers[-1])]
    pairs += [(torches[-1], version) for version in transformers]
    pairs += [(version, transformers[-1]) for version in reversed(torches)]
    return list(dict.fromkeys(pairs))


def published(package: str) -> list[str]:
    """The versions the package index has, in the order pip tells them."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", package], capture_output=True, text=True
    )
    found = re.search(r"^Available versions: (.+)$", told.stdout, re.MULTILINE)
    if not found:
        raise MatrixError(
            f"pip cannot list the versions of {package}; name pairs instead: --pair "
            f"2.13.0:5.24.0\n{told.stderr}"
        )
    return found[1].split(", ")


# ---------------------------------------------------------------------------------- one environment


def other_requirements() -> list[str]:
    """What pyproject.toml asks for beside torch and transformers, with what the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["search"]
    return [one for one in asked if not one.startswith(("torch>", "transformers>"))] + list(
        TEST_TOOLS
    )


def build(folder: Path, pair: Pair) -> Path:
    """Python of an environment with this pair; built once, marked whole by a file of its own."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)  # half an environment
    _run([sys.executable, "-m", "venv", str(folder)])
    torch, transformers = pair
    asked = [f"torch=={torch}", f"transformers=={transformers}", *other_requirements()]
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *asked])
    ready.touch()
    return python


def installed_from_wheel(python: Path, place: Path) -> None:
    """Install the project in the environment from a wheel, without its dependencies. `place`
    becomes a copy of the checkout without the package, so that tests there find the one that is
    installed.
    """
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, place, symlinks=True, ignore=left_out, dirs_exist_ok=True)
    pip = [str(python), "-m", "pip"]
    with tempfile.TemporaryDirectory() as made:
        _run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", made, str(place)])
        (wheel,) = Path(made).glob("*.whl")
        _run([*pip, "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)])
    for package in ("polar_fx", "passes"):
        shutil.rmtree(place / package)
    for left in (place / "build", *place.glob("*.egg-info")):  # of the build; versions are read
        shutil.rmtree(left, ignore_errors=True)
    where = "import polar_fx, sys; sys.exit(not polar_fx.__file__.startswith(sys.prefix))"
    _run([str(python), "-P", "-c", where])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise MatrixError(f"{' '.join(command[:5])} … failed: {last[-1]}")


# --------------------------------------------------------------------------------------- one result


def counts(report: str) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit report, and the names of those that failed."""
    outcomes: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"] += 1
            file = case.get("classname", "").rpartition(".")[2]
            outcomes["failures"].append(f"{file}::{case.get('name')}" if file else case.get("name"))
        else:
            outcomes["skipped" if case.find("skipped") is not None else "passed"] += 1
    outcomes["failures"].sort()
    return outcomes


def measure(pair: Pair, folder: Path, *, jobs: int, minutes: float, wheel: bool) -> dict[str, Any]:
    """Build the environment and run the tests, on the checkout or on a wheel of it; what goes wrong
    on the way is part of the result.
    """
    result: dict[str, Any] = {
        "torch": pair[0],
        "transformers": pair[1],
        "commit": _commit(),
        "python": platform.python_version(),
        "wheel": wheel,
    }
    start = time.monotonic()
    try:
        python = build(folder, pair)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            tests = Path(place) if wheel else ROOT
            if wheel:
                installed_from_wheel(python, tests)
            start = time.monotonic()
            result |= _tested(python, tests, folder=folder, jobs=jobs, minutes=minutes)
    except (MatrixError, OSError) as error:
        result["error"] = str(error)
    except subprocess.TimeoutExpired:
        result["error"] = f"not done after {minutes:g} minutes; see --minutes"
    return result | {"seconds": round(time.monotonic() - start)}


def _tested(
    python: Path, place: Path, *, folder: Path, jobs: int, minutes: float
) -> dict[str, Any]:
    """Counts of the tests, run in `place`, where they take the package from if it is there."""
    report = folder.with_suffix(".xml")
    report.unlink(missing_ok=True)
    # a thread each: compute threads of processes that wait for each other's cores are slower than
    # none
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(place),
        "POLAR_FX_CACHE_DIR": str(folder / "cache"),
    }
    command = [str(python), "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *SUBSET]
    done = subprocess.run(command, cwd=place, env=environment, timeout=60 * minutes)
    # 1: some tests failed; anything else: not all were run
    if done.returncode not in (0, 1) or not report.exists():
        raise MatrixError("pytest did not run all tests; its output above says why")
    return counts(report.read_text(encoding="utf-8"))


def _commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return told.stdout.strip() or "unknown"


# -------------------------------------------------------------------------------------- all results


def load(path: Path) -> list[dict[str, Any]]:
    """What was measured so far; none if the file is not there."""
    return json.loads(path.read_text(encoding="utf-8"))["pairs"] if path.exists() else []


def still_to_do(
    pairs: Iterable[Pair], results: Iterable[dict[str, Any]], *, wheel: bool = False
) -> list[Pair]:
    """The pairs nothing was measured for, or not on a wheel if that is asked for; one that could
    not be built or did not end is tried again.
    """
    done: set[Pair] = set()
    for r in results:
        if "error" not in r and (r.get("wheel") or not wheel):
            done.add((r["torch"], r["transformers"]))
    return [pair for pair in pairs if pair not in done]


def with_result(results: Iterable[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The results with the new one in place of an older one of the same pair, in the order of their
    versions.
    """
    pair = (new["torch"], new["transformers"])
    kept = [r for r in results if (r["torch"], r["transformers"]) != pair]
    return sorted([*kept, new], key=lambda r: (_number(r["torch"]), _number(r["transformers"])))


def table(results: Sequence[dict[str, Any]]) -> str:
    """docs/versions.md: a row for each torch, a column for each transformers, and what failed."""
    torches = sorted({r["torch"] for r in results}, key=_number)
    others = sorted({r["transformers"] for r in results}, key=_number)
    cells = {(r["torch"], r["transformers"]): _cell(r) for r in results}
    lines = [
        "# Versions",
        "",
        "Pairs of torch and transformers for which `make matrix` ran a part of the tests on the "
        "CPU: capture, a sample of",
        "families, forward passes and generation, compiled regions, bundles, passes. A dash is a "
        "pair that was not tried;",
        '"a wheel" is a pair that ran on the project installed from a wheel.',
        "",
        "This file is written by `tests/support/matrix.py`; raw numbers: "
        "`bench/results/versions-cpu.json`.",
        "",
        "| torch | " + " | ".join(f"transformers {version}" for version in others) + " |",
        "|---|" + "---|" * len(others),
    ]
    for torch in torches:
        row = [torch, *(cells.get((torch, other), "–") for other in others)]
        lines.append(f"| {' | '.join(row)} |")
    for r in results:
        what = [r["error"]] if "error" in r else [f"`{name}`" for name in r["failures"]]
        if what:
            lines += [
                "",
                f"torch {r['torch']} with transformers {r['transformers']}:",
                "",
                *(f"- {one}" for one in what),
            ]
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any]) -> str:
    if "error" in result:
        return "did not run"
    skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
    failed = f"**{result['failed']} failed**, " if result["failed"] else ""
    wheel = " (a wheel)" if result.get("wheel") else ""
    return f"{failed}{result['passed']} passed{skipped}{wheel}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--pair",
        action="append",
        metavar="TORCH:TRANSFORMERS",
        help="try this pair; may be given several times",
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".matrix", help="where environments are built"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests")
    parser.add_argument(
        "--minutes", type=float, default=30, help="the longest the tests of a pair may take"
    )
    parser.add_argument(
        "--wheel", action="store_true", help="run on a wheel of the project that is installed"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure pairs that were measured already, too"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the environments (about 6 GB each with a CUDA build of torch)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.pair:
        pairs: list[Pair] = []
        for text in chosen.pair:
            torch, _, other = text.partition(":")
            pairs.append((torch, other))
        if not all(re.fullmatch(r"\d+\.\d+\.\d+", version) for pair in pairs for version in pair):
            parser.error("a pair is two versions of three numbers, as in --pair 2.13.0:5.24.0")
    else:
        known = {*TRANSFORMERS, newest_of_each_minor(published("transformers"), (5, 17))[-1]}
        pairs = edge_pairs(newest_of_each_minor(published("torch")), sorted(known, key=_number))
    chosen.folder.mkdir(parents=True, exist_ok=True)
    results = load(RESULTS)
    for pair in pairs if chosen.again else still_to_do(pairs, results, wheel=chosen.wheel):
        print(f"torch {pair[0]}, transformers {pair[1]}", flush=True)
        folder = chosen.folder.resolve() / "-".join(pair)
        result = measure(pair, folder, jobs=chosen.jobs, minutes=chosen.minutes, wheel=chosen.wheel)
        print(_cell(result), result.get("error", ""), flush=True)
        results = with_result(load(RESULTS), result)  # read anew: another run may have added to it
        RESULTS.write_text(json.dumps({"pairs": results}, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(table(results), encoding="utf-8")
        if not chosen.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except MatrixError as error:
        sys.exit(f"matrix: {error}")
