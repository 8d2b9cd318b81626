"""This project beside what users would pick instead on a CPU: transformers, llama.cpp, OpenVINO
GenAI, ONNX Runtime GenAI and vLLM, with the same weights, threads and prompts.

    python bench/peers.py --threads 2 --llama-cpp llama.cpp --python vLLM=venv/bin/python

Every contender is a process of its own; all are ready before the first is timed, and then they take
turns, one measurement each a round, while the others sleep: a prompt, and a token of one row and of
several. `--llama-cpp` is a checkout with its tools built for this machine; `--python` names the
interpreter of an environment that holds a library; what is not there is left out, and the results
say so. Medians and ratios of the same rounds; start to first token and memory are noted once, the
start of what keeps compiled code on disk also where nothing is there yet.

Shape legend: B rows, T tokens of each prompt.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import polar_fx
from measure import RESULTS, machine, paired_ratio, spread, write, write_json

# Rows and tokens of each prompt.
Setting = tuple[int, int]
SETTINGS: tuple[Setting, ...] = (
    (1, 16),
    (1, 128),
    (1, 512),
    (1, 2048),
    (4, 64),
    (8, 64),
    (16, 64),
)
OURS = "polar_fx"
KINDS = (OURS, "HF eager", "llama.cpp", "vLLM", "OpenVINO GenAI", "ONNX Runtime GenAI")
_WORKER = Path(__file__).parent / "peers_workers.py"
_PATIENCE = 900.0  # seconds until a contender must be ready
_DTYPES = ("float32", "bfloat16", "int8", "int4")
# llama.cpp's names of precisions
_GGUF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "Q8_0", "int4": "Q4_K"}


@dataclass(frozen=True)
class Contender:
    """One process: `kind` of library, precision, the interpreter that runs it, and what it needs
    to be told.
    """

    kind: str
    dtype: str
    model: str
    python: str = sys.executable
    tool: str = ""
    weights: str = ""  # their precision, where it is another one

    @property
    def name(self) -> str:
        """As the results have it."""
        shown = _GGUF[self.dtype] if self.kind == "llama.cpp" else self.dtype
        return f"{self.kind}, {shown}" + (f" (weights {self.weights})" if self.weights else "")


@dataclass
class Running:
    """A contender that is ready, what its start took, and its measurements by setting."""

    contender: Contender
    process: "subprocess.Popen[str]"
    start: dict[str, float]
    found: dict[Setting, list[dict[str, float]]] = field(default_factory=dict)

    def measure(self, rows: int, tokens: int) -> None:
        """One measurement. Raises RuntimeError if the contender ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"rows": rows, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contender.name} ended")
        self.found.setdefault((rows, tokens), []).append(json.loads(line))


@contextmanager
def started(contender: Contender, threads: int, *, store: Path) -> Iterator[Running]:
    """A contender that has answered once; ours keeps compiled code in `store`. Raises RuntimeError
    with the end of what it printed.
    """
    told = {
        "kind": contender.kind,
        "dtype": contender.dtype,
        "model": contender.model,
        "tool": contender.tool,
        "threads": threads,
    }
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "POLAR_FX_CACHE_DIR": str(store),
    }
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [contender.python, str(_WORKER), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
            env={**os.environ, **settings},
            start_new_session=True,  # some start processes of their own, which have to end with it
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                printed.seek(0)
                last = printed.read().strip().splitlines()[-3:]
                raise RuntimeError(f"{contender.name} does not start: {' | '.join(last)[:400]}")
            yield Running(contender, process, json.loads(line))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def first_start(contender: Contender, threads: int, *, store: Path) -> dict[str, float]:
    """Seconds of a start with an empty store, before the one that is measured, if it has one."""
    if contender.kind != OURS:
        return {}
    with started(contender, threads, store=store) as running:
        return {"first_time_s": running.start["ready_s"]}


# ------------------------------------------------------------------------------------ the weights


def saved(folder: Path) -> Path:
    """The default model as a folder of transformers, in bfloat16."""
    place = folder / "hf"
    if not (place / "model.safetensors").exists():
        model, tokenizer = polar_fx.load(None, torch.bfloat16)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def gguf(folder: Path, llama_cpp: Path, *, dtype: str) -> Path:
    """The same weights as a file of llama.cpp, by its own tools."""
    target = folder / f"model-{_GGUF[dtype]}.gguf"
    if target.exists():
        return target
    if dtype in ("float32", "bfloat16", "float16"):
        converter = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(saved(folder))]
        command = [*converter, "--outtype", _GGUF[dtype], "--outfile", str(target)]
    else:
        whole = gguf(folder, llama_cpp, dtype="bfloat16")
        quantize = str(llama_cpp / "build" / "bin" / "llama-quantize")
        command = [quantize, str(whole), str(target), _GGUF[dtype]]
    subprocess.run(command, check=True, capture_output=True)
    return target


def onnx(folder: Path, python: str, *, dtype: str) -> Path:
    """The same weights as ONNX Runtime GenAI's model builder makes them."""
    precision = {"float32": "fp32", "bfloat16": "fp32", "int8": "int8", "int4": "int4"}[dtype]
    target = folder / f"onnx-{precision}"
    if not (target / "genai_config.json").exists():
        builder = [python, "-m", "onnxruntime_genai.models.builder"]
        what = ["-i", str(saved(folder)), "-o", str(target), "-p", precision, "-e", "cpu"]
        subprocess.run([*builder, *what], check=True, capture_output=True)
    return target


def contender_of(
    kind: str, dtype: str, *, options: argparse.Namespace, folder: Path
) -> Contender | None:
    """One of the kinds in a precision, its files made; None if it was not asked for or has no such.

    Raises CalledProcessError if its files cannot be made.
    """
    hf, pythons = str(saved(folder)), dict(each.split("=", 1) for each in options.python)
    plain, python = dtype in ("float32", "bfloat16"), pythons.get(kind.split()[0], sys.executable)
    if kind not in (OURS, "HF eager", "llama.cpp") and python == sys.executable:
        return None
    if kind == OURS:
        return Contender(kind, dtype, hf)
    if kind in ("HF eager", "vLLM"):
        return Contender(kind, dtype, hf, python) if plain else None
    if kind == "ONNX Runtime GenAI":
        if dtype not in ("float32", "int4"):
            return None
        return Contender(kind, dtype, str(onnx(folder, python, dtype=dtype)), python)
    if options.llama_cpp is None:
        return None
    if kind == "OpenVINO GenAI":
        if not plain:
            return None
        # its reader takes no other GGUF files; it computes in the precision that is asked for
        model = gguf(folder, options.llama_cpp, dtype="float16")
        return Contender(kind, dtype, str(model), python, weights="float16")
    tool = options.llama_cpp / "build" / "bin" / "llama-batched-bench"
    return Contender(kind, dtype, str(gguf(folder, options.llama_cpp, dtype=dtype)), tool=str(tool))


# ---------------------------------------------------------------------------------------- results


def summary(running: Sequence[Running]) -> dict[str, Any]:
    """Of each contender, what its start took, its memory, and its times by setting."""
    ours = {each.contender.dtype: each for each in running if each.contender.kind == OURS}
    found: dict[str, Any] = {}
    for each in running:
        times: dict[str, Any] = {}
        for setting, lines in each.found.items():
            beside = ours[each.contender.dtype].found[setting]
            own: dict[str, Any] = {}
            for what in ("prefill_ms", "token_ms"):
                samples = [line[what] for line in lines]
                reference = [line[what] for line in beside]
                own[what] = spread(samples)
                own[f"{what.removesuffix('_ms')}_to_{OURS}"] = paired_ratio(samples, reference)
            times[f"{setting[0]} x {setting[1]}"] = own
        most = max(line["most_mb"] for line in itertools.chain(*each.found.values()))
        found[each.contender.name] = {"start": each.start, "most_mb": most, "times": times}
    return found


def setting(text: str) -> Setting:
    """Rows and tokens of "8x64". Raises ValueError."""
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def table(found: dict[str, Any], asked: Sequence[Setting]) -> str:
    """The medians, a row a contender."""
    settings = [f"{rows} x {tokens}" for rows, tokens in asked]
    heads = ["contender", "first token after, s", "memory, MB"]
    for what in ("prompt", "token"):
        heads += [f"{what} {each}, ms" for each in settings]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, own in found.items():
        ready, first = (own["start"].get(name) for name in ("ready_s", "first_time_s"))
        once = "" if first is None else f" (the first time {first:.0f})"
        cells = [f"{ready:.1f}{once}", f"{own['most_mb']:.0f}"]
        for what, digits in (("prefill_ms", 0), ("token_ms", 1)):
            for each in settings:
                times = own["times"].get(each)
                cells.append("–" if times is None else f"{times[what]['median']:.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=tuple(_GGUF), default=["float32", "bfloat16"]
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--settings", nargs="+", type=setting, default=SETTINGS, metavar="ROWSxTOKENS"
    )
    parser.add_argument("--llama-cpp", type=Path, help="a checkout with build/bin")
    parser.add_argument("--python", action="append", default=[], metavar="vLLM|OpenVINO|ONNX=PATH")
    parser.add_argument("--folder", type=Path, help="where files of weights are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers-cpu.json")
    options = parser.parse_args()
    left_out: list[str] = []
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        running: list[Running] = []
        for dtype, kind in itertools.product(options.dtypes, KINDS):
            try:
                contender = contender_of(kind, dtype, options=options, folder=folder)
                if contender is not None:
                    store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    first = first_start(contender, options.threads, store=store)
                    begun = started(contender, options.threads, store=store)
                    running.append(stack.enter_context(begun))
                    running[-1].start.update(first)
                    print(contender.name, "is ready:", running[-1].start, flush=True)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                if kind == OURS:
                    raise
                left_out.append(f"{kind}, {dtype}: {error}")
                print(left_out[-1], flush=True)
        begin = time.perf_counter()
        for number in range(options.rounds + 1):
            for rows, tokens in options.settings:
                for each in list(running):
                    try:
                        each.measure(rows, tokens)
                    except RuntimeError as error:
                        if each.contender.kind == OURS:
                            raise
                        running.remove(each)
                        left_out.append(str(error))
            if number == 0:  # shapes that are new are compiled, planned, allocated
                for each in running:
                    each.found.clear()
            print(
                f"round {number} of {options.rounds}, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
        found = summary(running)
    result = {"machine": machine(torch.device("cpu")), "threads": options.threads}
    write_json(options.out, {**result, "left_out": left_out, "contenders": found})
    write(options.out.with_suffix(".md"), table(found, options.settings))
    print(table(found, options.settings))


if __name__ == "__main__":
    main()
