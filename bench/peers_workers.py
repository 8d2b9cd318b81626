"""One contender of the comparison with peers, in a process of its own: reads what to time, a JSON
object a line, and answers with milliseconds.

Each library is used as its own documentation says, and imports nothing of the others. Shape legend:
B rows, T tokens of each prompt, N new tokens.
"""

import importlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Takes prompts of B rows of T tokens, and N: generates so many tokens after each.
Generate = Callable[[list[list[int]], int], object]

_SHORT, _LONG = 1, 33  # new tokens of the two calls whose difference is decoding
_MOST_WAKING = 4  # calls after the first, before times count


_calls = itertools.count()


def prompts_of(rows: int, tokens: int) -> list[list[int]]:
    """Random token ids, the same for every contender's nth call, and other ones at each call: some
    find the keys and values of an earlier prompt again.
    """
    pick = random.Random(next(_calls))
    return [pick.choices(range(1000, 40000), k=tokens) for _ in range(rows)]


def by_generating(generate: Generate, *, rows: int, tokens: int) -> dict[str, float]:
    """Milliseconds of a call for one new token, and of each further one of a longer call.

    Calls before them do not count, as long as they become faster: a contender has slept for
    minutes, and machines take memory away from those that sleep.
    """

    def spent(new: int) -> float:
        prompts = prompts_of(rows, tokens)
        start = time.perf_counter()
        generate(prompts, new)
        return 1e3 * (time.perf_counter() - start)

    before = spent(_LONG)
    for _ in range(_MOST_WAKING):
        now = spent(_LONG)
        if now > 0.9 * before:
            break
        before = now
    taken = {new: spent(new) for new in (_SHORT, _LONG)}
    a_token = (taken[_LONG] - taken[_SHORT]) / (_LONG - _SHORT)
    return {"prefill_ms": taken[_SHORT], "token_ms": a_token}


# ---------------------------------------------------------------------------------- the contenders


def _library(name: str) -> Any:
    """A library that need not be installed where this is checked."""
    return importlib.import_module(name)


def polar_fx_generate(folder: str, dtype: str) -> Generate:
    """This project, the model's own program; `dtype` may be a kind of quantization."""
    import torch

    import polar_fx

    quantized = dtype in ("int8", "int4")
    how: dict[str, Any] = {"quantize": dtype} if quantized else {}
    compiled = polar_fx.compile(polar_fx.load(folder, "bfloat16" if quantized else dtype, **how)[0])

    def generate(prompts: list[list[int]], new: int) -> object:
        return compiled.generate(
            torch.tensor(prompts),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    return generate


def hf_generate(folder: str, dtype: str) -> Generate:
    """transformers, eagerly."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], new: int) -> object:
        ids = torch.tensor(prompts)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    return generate


def vllm_generate(folder: str, dtype: str) -> Generate:
    """vLLM's offline engine."""
    vllm = _library("vllm")
    engine: Any = vllm.LLM(folder, dtype=dtype, max_model_len=2304, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], new: int) -> object:
        how = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return engine.generate(asked, how, use_tqdm=False)

    return generate


def openvino_generate(folder: str, dtype: str) -> Generate:
    """OpenVINO GenAI on a GGUF file, in the precision that it infers in."""
    import numpy as np

    ov, genai = _library("openvino"), _library("openvino_genai")
    hint = {"float32": "f32", "bfloat16": "bf16"}.get(dtype, "f32")
    pipeline: Any = genai.LLMPipeline(folder, "CPU", INFERENCE_PRECISION_HINT=hint)

    def generate(prompts: list[list[int]], new: int) -> object:
        ids = ov.Tensor(np.array(prompts, dtype=np.int64))
        mask = ov.Tensor(np.ones_like(np.array(prompts, dtype=np.int64)))
        how = genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample = new, True, False
        return pipeline.generate(genai.TokenizedInputs(ids, mask), how)

    return generate


def onnxruntime_generate(folder: str, dtype: str) -> Generate:
    """ONNX Runtime GenAI on what its model builder made."""
    import numpy as np

    genai = _library("onnxruntime_genai")
    model: Any = genai.Model(folder)

    def generate(prompts: list[list[int]], new: int) -> object:
        params = genai.GeneratorParams(model)
        longest = len(prompts[0]) + new
        params.set_search_options(
            batch_size=len(prompts), max_length=longest, min_length=longest, do_sample=False
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(new):
            generator.generate_next_token()
        return generator

    return generate


GENERATES: dict[str, Callable[[str, str], Generate]] = {
    "polar_fx": polar_fx_generate,
    "HF eager": hf_generate,
    "vLLM": vllm_generate,
    "OpenVINO GenAI": openvino_generate,
    "ONNX Runtime GenAI": onnxruntime_generate,
}


class LlamaCpp:
    """llama.cpp's own benchmark of batches: a process a measurement, its loading not counted."""

    def __init__(self, tool: str, model: str, *, threads: int) -> None:
        self.tool, self.model, self.threads = tool, model, threads

    def __call__(self, rows: int, tokens: int) -> dict[str, float]:
        new = _LONG - _SHORT
        asked = {
            "-m": self.model,
            "-npp": tokens,
            "-ntg": new,
            "-npl": rows,
            "-t": self.threads,
            "-c": rows * (tokens + new),
            "-b": 2048,
            "-ub": 512,
            "--output-format": "jsonl",
        }
        command = [self.tool, *(str(part) for pair in asked.items() for part in pair)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        line = next(line for line in run.stdout.splitlines() if line.startswith("{"))
        found = json.loads(line)
        return {"prefill_ms": 1e3 * found["t_pp"], "token_ms": 1e3 * found["t_tg"] / new}


def _measurer(asked: dict[str, Any]) -> Callable[[int, int], dict[str, float]]:
    if asked["kind"] == "llama.cpp":
        return LlamaCpp(asked["tool"], asked["model"], threads=asked["threads"])
    generate = GENERATES[asked["kind"]](asked["model"], asked["dtype"])
    return lambda rows, tokens: by_generating(generate, rows=rows, tokens=tokens)


def main(arguments: Sequence[str]) -> None:
    """Serve one contender, as the only argument describes it."""
    asked = json.loads(arguments[0])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and their processes print goes elsewhere
    measure = _measurer(asked)
    start = time.perf_counter()
    measure(1, 16)
    # from the start of the process: importing, loading, compiling or reading what was compiled
    age = time.time() - _started()
    print(json.dumps({"ready_s": age, "first_s": time.perf_counter() - start}), file=answers)
    answers.flush()
    for line in sys.stdin:
        wanted = json.loads(line)
        found = measure(wanted["rows"], wanted["tokens"])
        who = resource.RUSAGE_CHILDREN if asked["kind"] == "llama.cpp" else resource.RUSAGE_SELF
        most = resource.getrusage(who).ru_maxrss / 1024
        print(json.dumps({**found, "most_mb": most}), file=answers)
        answers.flush()


def _started() -> float:
    """When this process began, in seconds since the epoch."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    ticks = float(fields[19]) / 100
    return time.time() - uptime + ticks


if __name__ == "__main__":
    main(sys.argv[1:])
