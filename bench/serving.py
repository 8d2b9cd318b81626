"""64 requests at once to servers of the same weights in the same precision: this project's, with a
program a request and with the model's own alone, llama.cpp's and vLLM's.

    python bench/serving.py --dtype float32 --llama-cpp llama.cpp --vllm venv/bin/vllm

Each server runs as its documentation says, with as many threads as there are cores and 16 rows at
a time; all are up at once and take turns, a round of requests each, through the same client:
streamed completions of text prompts over HTTP, likeliest token, as OpenAI's API has them. Tokens
are those that servers count. `--llama-cpp` is a checkout with `build/bin/llama-server` and its
converter, which needs sentencepiece; what is not given is left out.
"""

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import polar_fx
from measure import RESULTS, machine, paired_ratio, spread, write_json
from polar_fx.compiled import CompiledModel

_REQUESTS, _ROWS, _LENGTH = 64, 16, 512
_MENU = ("identity", "skip 5", "skip 20-22", "repeat 10-11 x2", "skip 8; repeat 14 x2")
_TEXT = (
    "the river small house and old tree by a road where many people walk in morning light while "
    "children read about stars water bread music history numbers"
)
# Threads of a server that is told nothing else.
_THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: str
    new: int
    program: str


@dataclass(frozen=True)
class Answered:
    """When its first token and its end came, in seconds after all were sent, and its tokens."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Server:
    """Where one answers, what it calls the model, and what a request says beside the prompt."""

    name: str
    port: int
    model: str
    takes_programs: bool = False


def requests_of(seed: int) -> list[Asked]:
    """Prompts of 8 to 96 words and answers of 4 to 48 tokens."""
    pick, words = random.Random(seed), _TEXT.split()
    asked: list[Asked] = []
    for i in range(_REQUESTS):
        prompt = " ".join(pick.choice(words) for _ in range(pick.randint(8, 96)))
        asked.append(Asked(prompt, pick.randint(4, 48), _MENU[i % len(_MENU)]))
    return asked


# --------------------------------------------------------------------------------------- the client


def ask_all(server: Server, asked: Sequence[Asked]) -> tuple[float, list[Answered]]:
    """Send all at once: seconds until the last ended, and what came of each."""
    found: list[Answered | BaseException | None] = [None] * len(asked)
    start = time.perf_counter()

    def ask(number: int) -> None:
        try:
            found[number] = _ask(server, asked[number], start=start)
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, answers = time.perf_counter() - start, list[Answered]()
    for answer in found:
        if not isinstance(answer, Answered):
            raise RuntimeError(f"{server.name} failed: {answer!r}")
        answers.append(answer)
    return seconds, answers


def _ask(server: Server, asked: Asked, *, start: float) -> Answered:
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": asked.prompt,
        "max_tokens": asked.new,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if server.takes_programs:
        body["program"] = asked.program
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
    first, tokens = None, 0
    for event in _events(response):
        if first is None and any(choice.get("text") for choice in event.get("choices", ())):
            first = time.perf_counter() - start
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    last = time.perf_counter() - start
    return Answered(last if first is None else first, last, tokens)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        text = line.decode().strip().removeprefix("data:").strip()
        if text and text != "[DONE]":
            yield json.loads(text)


# -------------------------------------------------------------------------------------- the servers


@contextmanager
def _running(
    command: Sequence[str], log: Path, *, port: int, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A server that answers /health, until the end of the context."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
        try:
            _wait(process, log, port=port)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: "subprocess.Popen[bytes]", log: Path, *, port: int) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"a server ended:\n{log.read_text()[-3000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # it is not up yet
        finally:
            connection.close()
        time.sleep(1)
    raise RuntimeError(f"a server does not answer:\n{log.read_text()[-3000:]}")


def _ours(model: CompiledModel, tokenizer: Any, *, work: Path, stack: ExitStack) -> list[Server]:
    """One server; the model's own program is asked of it as well."""
    bundle = work / "bundle"
    programs = [model.resolve(text) for text in _MENU]
    polar_fx.export(model, bundle, programs, buckets=(1, _ROWS), tokenizer=tokenizer)
    command = [sys.executable, "-m", "polar_fx", "serve", str(bundle), "--port", "8071"]
    command += ["--max-batch", str(_ROWS)]
    stack.enter_context(_running(command, work / "polar_fx.log", port=8071))
    return [
        Server("polar_fx, a program each", 8071, "bundle", takes_programs=True),
        Server("polar_fx, the model's own", 8071, "bundle"),
    ]


def _llama_cpp(place: Path, hf: Path, *, work: Path, dtype: str, stack: ExitStack) -> Server:
    out = work / "model.gguf"
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    subprocess.run(
        [
            *(sys.executable, str(place / "convert_hf_to_gguf.py"), str(hf)),
            *("--outtype", kind, "--outfile", str(out)),
        ],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(place / "gguf-py")},
    )
    command = [str(place / "build/bin/llama-server"), "-m", str(out), "--port", "8072"]
    command += ["-t", str(_THREADS), "-tb", str(_THREADS)]
    command += ["-np", str(_ROWS), "-c", str(_ROWS * _LENGTH)]
    stack.enter_context(_running(command, work / "llama.log", port=8072))
    return Server("llama.cpp server", 8072, "model")


def _vllm(program: Path, hf: Path, *, work: Path, dtype: str, stack: ExitStack) -> Server:
    command = [str(program), "serve", str(hf), "--port", "8073", "--dtype", dtype]
    command += ["--max-num-seqs", str(_ROWS), "--max-model-len", str(_LENGTH)]
    command += ["--served-model-name", "model"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    stack.enter_context(_running(command, work / "vllm.log", port=8073, environment=environment))
    return Server("vLLM, CPU", 8073, "model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--llama-cpp", type=Path, metavar="CHECKOUT")
    parser.add_argument("--vllm", type=Path, metavar="PROGRAM")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype: str = options.dtype
    loaded, tokenizer = polar_fx.load(None, getattr(torch, dtype))
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hf = work / "hf"
        loaded.save_pretrained(hf)
        tokenizer.save_pretrained(hf)
        model = polar_fx.compile(loaded, "aot_inductor", max_length=_LENGTH)
        servers = _ours(model, tokenizer, work=work, stack=stack)
        if options.llama_cpp:
            servers.append(_llama_cpp(options.llama_cpp, hf, work=work, dtype=dtype, stack=stack))
        if options.vllm:
            servers.append(_vllm(options.vllm, hf, work=work, dtype=dtype, stack=stack))
        result = {
            "machine": machine(model.device),
            "dtype": dtype,
            "requests": _REQUESTS,
            "rows": _ROWS,
            "servers": _measured(servers, options.rounds),
        }
    write_json(options.out or RESULTS / f"serving-cpu-{dtype}.json", result)


def _measured(servers: Sequence[Server], rounds: int) -> dict[str, Any]:
    """Of each server, over the rounds after the first, which warms up."""
    seen: dict[str, list[Answered]] = {server.name: [] for server in servers}
    rates: dict[str, list[float]] = {server.name: [] for server in servers}
    for number in range(rounds + 1):
        asked = requests_of(number)
        for server in servers:
            seconds, answers = ask_all(server, asked)
            tokens = sum(answer.tokens for answer in answers)
            if number:
                seen[server.name] += answers
                rates[server.name].append(tokens / seconds)
            print(f"{number} {server.name}: {seconds:.2f} s, {tokens} tokens", flush=True)
    found, reference = {}, rates[servers[0].name]
    for name, answers in seen.items():
        firsts = sorted(answer.first for answer in answers)
        lasts = sorted(answer.last for answer in answers)
        found[name] = {
            "tokens_a_second": spread(rates[name]),
            "by_first": paired_ratio(rates[name], reference),
            "first_token_p50_s": firsts[len(firsts) // 2],
            "first_token_p99_s": firsts[int(len(firsts) * 0.99)],
            "answer_p50_s": lasts[len(lasts) // 2],
        }
    return found


if __name__ == "__main__":
    main()
