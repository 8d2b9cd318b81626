"""Bundles of SmolLM2-135M: size with 1 and 64 programs, time and memory of loading, first token,
and logits.

    python bench/bundle.py  # fp32; writes bench/results/bundle-cpu-float32.json
    python bench/bundle.py --dtype bfloat16 --rounds 3

Bundles are exported first. Each round then starts one fresh process of each kind, in shuffled
order: Python with either bundle, Python with files that the system's page cache does not hold, and
the C++ runner if it can be built. Every process counts what it compiles and traces between the
beginning of loading and the first token of a prompt of 32 tokens.
"""

import argparse
import hashlib
import inspect
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, spread, write_json

PROMPT_TOKENS, NUM_PROGRAMS, NUM_COMPARED, LENGTH = 32, 64, 51, 256
RUNNER = Path(__file__).parent.parent / "polar_fx" / "bundle" / "cpp"

_LOAD = """
import json, sys, time
from pathlib import Path

start, folder, prompt = float(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def memory():
    lines = [
        line.split()
        for name in ("status", "smaps_rollup")
        for line in Path("/proc/self", name).read_text().splitlines()
    ]
    names = ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:", "Pss:")
    return {line[0][:-1]: 1024 * int(line[1]) for line in lines if line and line[0] in names}

report, stages = {"imports_s": {}, "memory": {"python": memory()}}, {}
for name in ("torch", "transformers", "polar_fx"):
    before = time.perf_counter()
    if name == "torch":
        import torch
    elif name == "transformers":
        from transformers import (
            GenerationConfig,
            GenerationMixin,
            PreTrainedConfig,
            PreTrainedModel,
        )
    else:
        from polar_fx.bundle import load_bundle, loader
        from polar_fx.runtime.regions import RegionTable
    report["imports_s"][name] = time.perf_counter() - before
    report["memory"][name] = memory()

started, graphs = [], []
WATCHED = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "os.fork")
sys.addaudithook(lambda event, args: started.append(str(args[:2])) if event in WATCHED else None)
make = torch.fx.Graph.__init__
torch.fx.Graph.__init__ = lambda self, *a, **kw: (graphs.append(1), make(self, *a, **kw))[1]

def timed(owner, name):
    work = getattr(owner, name)

    def call(*args, **options):
        before = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            stages[name] = stages.get(name, 0.0) + time.perf_counter() - before

    setattr(owner, name, call)

for owner, name in (
    (loader, "read_manifest"),
    (loader, "_verified"),
    (loader, "load_weights"),
    (RegionTable, "get"),
):
    timed(owner, name)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
ids = torch.tensor([prompt])
began = time.perf_counter()
bundle = load_bundle(folder)
loaded = time.perf_counter()
report["memory"]["loaded"] = memory()
"""
_FIRST = """
tokens = bundle.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
first, now = time.perf_counter(), time.time()
report["memory"]["first token"] = memory()
bundle.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
tensors = {t.data_ptr(): t for t in bundle.library.tensors.values()}
report |= {
    "load_s": loaded - began,
    "first_token_s": first - loaded,
    "second_prompt_s": time.perf_counter() - first,
    "from_start_s": now - start,
    "token": int(tokens[0, -1]),
    "load_stages_s": {
        "manifest": stages["read_manifest"],
        "other files": stages["_verified"] - stages["read_manifest"],
        "weights": stages["load_weights"],
        "regions": stages["get"],
        "the rest": loaded - began - stages["_verified"] - stages["load_weights"] - stages["get"],
    },
    "weights_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
    "kv_pool_bytes": bundle.pool.num_bytes,
    "compiled": len(bundle.compilations),
    "traced": bundle.library.is_traced,
    "graphs": len(graphs),
    "started": started,
    "regions": [r.source for r in bundle.regions.records],
    "programs": len(bundle.programs),
}
print(json.dumps(report))
"""
_RUN = """
import json, os, sys, time

start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
if os.waitstatus_to_exitcode(status):
    raise SystemExit(f"{sys.argv[1:]} failed")
print(
    json.dumps({"from_start_s": time.perf_counter() - start, "peak_bytes": 1024 * usage.ru_maxrss})
)
"""
_LOGITS = """
from safetensors.torch import load_file
wanted = load_file(sys.argv[4])
with torch.no_grad():
    found = {program: answer(bundle, ids, program) for program in wanted}
print(json.dumps({p: float((found[p] - wanted[p]).abs().max()) for p in wanted}))
"""


def answer(model: Any, ids: Any, program: str) -> Any:
    """[2, V]: logits of the prompt's last token, and of one decoded token.

    Its text also runs in another process.
    """
    import torch

    chosen = model.resolve(program)
    with model.session(chosen, 1) as session:
        last = model.prefill(chosen, session, list(ids))[0].clone()
        return torch.stack([last, model.decode(chosen, session, torch.tensor([5]))[0]]).float()


def python(code: str, folder: Path, prompt: list[int], *more: str) -> Any:
    """One fresh process; seconds count from before it starts."""
    command = [
        sys.executable,
        "-c",
        code,
        repr(time.time()),
        str(folder),
        json.dumps(prompt),
        *more,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def cpp(runner: Path, folder: Path, prompt: list[int], *options: str) -> dict[str, Any]:
    """One run of the C++ runner to its first token: seconds from before it starts, and its peak
    memory.
    """
    command = [
        str(runner),
        str(folder),
        "--tokens",
        ",".join(map(str, prompt)),
        "--new",
        "1",
        *options,
    ]
    # by a small process: what is started by this one would count its memory as its own
    result = subprocess.run(
        [sys.executable, "-c", _RUN, *command], capture_output=True, text=True, check=True
    )
    *printed, report = result.stdout.splitlines()
    return json.loads(report) | ({} if "--steps" in options else {"token": int(printed[0])})


def build_runner(place: Path) -> Path | None:
    """The C++ runner, or None where there is no compiler."""
    import torch

    if shutil.which("cmake") is None or not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        return None
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(RUNNER), "-B", str(place), prefix],
        ["cmake", "--build", str(place)],
    ):
        subprocess.run(command, capture_output=True, check=True)
    return place / "polar_run"


def forget(folder: Path) -> None:
    """Ask the system to drop its cached pages of the bundle's files."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> float:
    """Hash the weights file, so that the page cache holds it; seconds of the second time."""
    for path in filter(Path.is_file, folder.rglob("*")):
        path.read_bytes()
    start = time.perf_counter()
    with (folder / "weights.safetensors").open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return time.perf_counter() - start


def random_programs(depth: int, number: int) -> list[str]:
    """The identity and others: layers left out, segments repeated up to three times, some
    blended.
    """
    from polar_fx import Program

    pick, found = random.Random(0), [Program.identity(depth)]
    while len(found) < number:
        path = [layer for layer in range(depth) if pick.random() < 0.9] or [0]
        start = pick.randrange(len(path))
        stop = min(len(path), start + pick.randint(1, 4))
        segment, times = " ".join(map(str, path[start:stop])), pick.randint(2, 3)
        middle = f"({segment})*{times}{pick.choice(('', '', '@0.5'))}"
        text = " ".join([*map(str, path[:start]), middle, *map(str, path[stop:])])
        program = Program.parse(f"{text} /{depth}", depth)
        if program not in found:
            found.append(program)
    return list(map(str, found))


def make_bundles(
    dtype: str, place: Path, *, prompt: list[int]
) -> tuple[dict[int, Path], dict[str, Any]]:
    """Bundles of 1 and of 64 programs, their sizes, and the largest difference of their logits to
    those of this process.
    """
    import torch
    from safetensors.torch import save_file

    import polar_fx

    model, tokenizer = polar_fx.load(dtype=getattr(torch, dtype))
    compiled = polar_fx.compile(model, backend="aot_inductor", max_length=LENGTH)
    programs = random_programs(compiled.depth, NUM_PROGRAMS)
    folders = {n: place / f"bundle-{n}" for n in (1, NUM_PROGRAMS)}
    for number, folder in folders.items():
        polar_fx.export(compiled, folder, programs[:number], tokenizer=tokenizer)
    sizes = {number: bytes_in(folder) for number, folder in folders.items()}
    with torch.no_grad():
        logits = {p: answer(compiled, torch.tensor([prompt]), p) for p in programs[:NUM_COMPARED]}
    save_file(logits, place / "logits.safetensors")
    code = _LOAD + "from typing import Any\n" + inspect.getsource(answer) + _LOGITS
    differences = python(code, folders[NUM_PROGRAMS], prompt, str(place / "logits.safetensors"))
    about = {
        "programs": programs,
        "bytes": sizes,
        "size_ratio": sizes[NUM_PROGRAMS] / sizes[1],
        "logits_max_difference": max(differences.values()),
        "logits_differences": differences,
        "logits_largest": max(float(t.abs().max()) for t in logits.values()),
    }
    return folders, about


def bytes_in(folder: Path) -> int:
    """Of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure, over the samples."""
    return {name: statistics.median(map(itemgetter(name), samples)) for name in samples[0]}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and quartiles of each kind of process, memory against what it must hold, and what was
    compiled.
    """
    found: dict[str, Any] = {}
    for kind, samples in runs.items():
        about: dict[str, Any] = {"from_start_s": spread([s["from_start_s"] for s in samples])}
        if "load_s" not in samples[0]:
            found[kind] = about | {
                "peak_bytes": statistics.median(s["peak_bytes"] for s in samples)
            }
            continue
        for name in ("load_s", "first_token_s", "second_prompt_s"):
            about[name] = spread([s[name] for s in samples])
        for name in ("imports_s", "load_stages_s"):
            about[name] = medians([s[name] for s in samples])
        about["memory"] = {}
        for moment in samples[0]["memory"]:
            about["memory"][moment] = medians([s["memory"][moment] for s in samples])
        weights, pool = samples[0]["weights_bytes"], samples[0]["kv_pool_bytes"]
        base, end = about["memory"]["polar_fx"], about["memory"]["first token"]
        about |= {
            "weights_bytes": weights,
            "kv_pool_bytes": pool,
            "allowed_bytes": 1.15 * weights + pool,
            "resident_beyond_imports_bytes": end["VmRSS"] - base["VmRSS"],
            "peak_beyond_imports_bytes": end["VmHWM"] - base["VmRSS"],
            "of_weights_and_pool": (end["VmRSS"] - base["VmRSS"]) / (weights + pool),
        }
        for name in ("compiled", "traced", "graphs"):
            about[name] = sum(s[name] for s in samples)
        about["started"] = sorted({c for s in samples for c in s["started"]})
        found[kind] = about
    return found


def starts(
    one: Path, many: Path, *, runner: Path | None, prompt: list[int]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Ways to start, each one fresh process up to its first token."""

    def not_cached() -> dict[str, Any]:
        forget(one)
        return python(_LOAD + _FIRST, one, prompt)

    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "1 program": lambda: python(_LOAD + _FIRST, one, prompt),
        f"{NUM_PROGRAMS} programs": lambda: python(_LOAD + _FIRST, many, prompt),
        "1 program, files not cached": not_cached,
    }
    if runner is not None:
        kinds |= {
            "C++": lambda: cpp(runner, one, prompt),
            "C++ without hashing": lambda: cpp(runner, one, prompt, "--sizes-only"),
            "C++ that loads nothing": lambda: cpp(runner, one, prompt, "--steps"),
        }
    return kinds


def show(report: dict[str, Any]) -> None:
    for kind, found in report["summary"].items():
        names = [n for n in ("load_s", "first_token_s", "from_start_s") if n in found]
        times = ", ".join(f"{n} {found[n]['median']:.2f}" for n in names)
        print(f"{kind}: {times}", end="")
        if "compiled" in found:
            print(
                f"; beyond imports {found['of_weights_and_pool']:.3f} x (weights + KV pool); "
                f"compiled {found['compiled']}",
                end="",
            )
        print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--ready", type=Path, metavar="FILE", help="wait for this file between export and measuring"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    prompt = [random.Random(0).randrange(1000) for _ in range(PROMPT_TOKENS)]
    with tempfile.TemporaryDirectory(prefix="polar_fx-bench-") as place:
        folders, about = make_bundles(options.dtype, Path(place), prompt=prompt)
        one, many = folders.values()
        runner = build_runner(Path(place, "runner"))
        print(
            f"sizes {about['bytes']}, logits differ by {about['logits_max_difference']:.1e}",
            file=sys.stderr,
        )
        while options.ready and not options.ready.exists():
            time.sleep(0.5)
        kinds = starts(one, many, runner=runner, prompt=prompt)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        order, hashing = random.Random(0), []
        for _ in range(options.rounds):
            for name in order.sample(list(kinds), len(kinds)):
                hashing.append(min(remember(folder) for folder in folders.values()))
                runs[name].append(kinds[name]())
    import torch

    tokens = {s["token"] for samples in runs.values() for s in samples if "token" in s}
    if len(tokens) != 1:
        raise RuntimeError(f"the first token is not the same in all processes: {tokens}")
    report = {
        "benchmark": "bundle",
        "model": "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "machine": machine(torch.device("cpu")),
        "prompt_tokens": PROMPT_TOKENS,
        "max_length": LENGTH,
        "rounds": options.rounds,
        **about,
        "hash_of_weights_s": spread(hashing),
        "summary": summary(runs),
        "runs": runs,
    }
    write_json(options.output or RESULTS / f"bundle-cpu-{options.dtype}.json", report)
    show(report)


if __name__ == "__main__":
    main()
