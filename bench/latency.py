"""Prefill and decode latency: HF eager, whole-model torch.compile with a static cache, and linked programs.

    python bench/latency.py                       # SmolLM2-135M-Instruct, fp32
    python bench/latency.py --rounds 4 --tokens 8 # a quick look
    python bench/latency.py --threads 1 --dtype bfloat16 --output bench/results/mine.json

Every round runs each contender once, in a shuffled order, in one process: prefill of one prompt, then decoding
of the following tokens. Compile times are reported apart. Shape legend: B batch, T tokens.
"""

import argparse
import random
import statistics
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import DynamicCache, PreTrainedModel, StaticCache

import polar_fx
from measure import RESULTS, bandwidth_gbs, machine, paired_ratio, spread, timed, write, write_json
from polar_fx import CompiledModel, Program
from polar_fx.capture import CACHE
from polar_fx.backends import InductorBackend, ShapeClass

WHOLE = "whole-model torch.compile"


class Contender(ABC):
    """One way to run the model: `prefill` starts over, `decode` appends one token to what is there."""

    steps: int
    kind: ClassVar[str]

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [B, V] of the last token of ids i64[B, T]."""

    @abstractmethod
    def decode(self, token: Tensor) -> Tensor:
        """Logits [B, V] after one more token i64[B, 1]."""

    def finish(self) -> None:
        """End of a round."""


class HfEager(Contender):
    kind = "hf"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__("HF eager, dynamic cache", model.config.num_hidden_layers)
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self.model(ids, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]

    def decode(self, token: Tensor) -> Tensor:
        return self.model(token, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]


class HfCompiled(Contender):
    """What users would pick instead: `torch.compile(model)`, static shapes, a static cache."""

    kind = "hf"

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__(WHOLE + ", static cache", model.config.num_hidden_layers)
        config = model.config
        self.model = torch.compile(model, dynamic=False)
        self.cache = StaticCache(config=config, max_cache_len=length)
        heads = config.num_key_value_heads
        self.cache.early_initialization(1, heads, config.hidden_size // config.num_attention_heads, model.dtype, model.device)

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache.reset()
        return self.model(ids, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]

    def decode(self, token: Tensor) -> Tensor:
        return self.model(token, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]


class Ours(Contender):
    def __init__(self, compiled: CompiledModel, label: str, program: Program) -> None:
        super().__init__(f"polar_fx {compiled.backend.name}, {label}", program.num_steps)
        self.compiled, self.program, self.label = compiled, program, label
        self.kind = compiled.backend.name  # type: ignore[misc]

    def prefill(self, ids: Tensor) -> Tensor:
        self.context = self.compiled.session(self.program, ids.shape[0])
        self.session = self.context.__enter__()
        return torch.stack(self.compiled.prefill(self.program, self.session, list(ids)))

    def decode(self, token: Tensor) -> Tensor:
        return self.compiled.decode(self.program, self.session, token[:, 0])

    def finish(self) -> None:
        self.context.__exit__(None, None, None)


def programs_for(depth: int) -> dict[str, Program]:
    """Identity, every second layer, a skipped middle half, and a repeated block: 1, 0.5, 0.5 and 1.5 times the steps."""
    half = depth // 2
    return {
        "identity": Program.identity(depth),
        "every second layer": Program.from_path(tuple(range(0, depth, 2)), depth),
        "middle half skipped": Program.identity(depth).skip(depth // 4, half),
        "middle half repeated": Program.identity(depth).repeat(depth // 4, half, 2),
    }


@torch.no_grad()
def first_calls(contenders: list[Contender], ids: Tensor, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of the first prefill and decode of each contender, compilation included, and their agreement."""
    seconds: dict[str, dict[str, float]] = {}
    for contender in contenders:
        times = {"first_prefill_s": timed(lambda c=contender: c.prefill(ids), device) / 1e3}
        times["first_decode_s"] = timed(lambda c=contender: c.decode(ids[:, :1]), device) / 1e3
        contender.decode(ids[:, :1])
        contender.finish()
        seconds[contender.name] = times
        print(f"  {contender.name}: {times['first_prefill_s']:.2f} s + {times['first_decode_s']:.2f} s", file=sys.stderr)
    return seconds


@torch.no_grad()
def agreement(contenders: list[Contender], ids: Tensor) -> dict[str, float]:
    """Largest absolute logit difference to the first contender (HF eager), for those that run every layer once."""
    found: dict[str, float] = {}
    reference: list[Tensor] = []
    for contender in contenders:
        if isinstance(contender, Ours) and not contender.program.is_identity:
            continue
        logits = [contender.prefill(ids).clone(), contender.decode(ids[:, :1]).clone()]
        contender.finish()
        reference = reference or logits
        found[contender.name] = max(float((a - b).abs().max()) for a, b in zip(logits, reference, strict=True))
    return found


@torch.no_grad()
def run_rounds(
    contenders: list[Contender], ids: Tensor, tokens: int, rounds: int, device: torch.device, console: Console
) -> dict[str, dict[str, list[float]]]:
    """Per contender: one prefill time a round, and the round's median decode time per token, in milliseconds."""
    samples: dict[str, dict[str, list[float]]] = {c.name: {"prefill": [], "decode": []} for c in contenders}
    following = torch.randint(0, 1000, (tokens, ids.shape[0], 1), generator=torch.Generator().manual_seed(1)).to(device)
    order = random.Random(0)
    for _ in track(range(rounds), description="rounds", console=console):
        for contender in order.sample(contenders, len(contenders)):
            times = samples[contender.name]
            times["prefill"].append(timed(lambda c=contender: c.prefill(ids), device))
            each = [timed(lambda c=contender, t=token: c.decode(t), device) for token in following]
            times["decode"].append(statistics.median(each))
            contender.finish()
    return samples


def decode_bytes(compiled: CompiledModel, program: Program, cached: int) -> int:
    """Bytes one decoded token must read at least: weights of every step and of the head, and the cached KV."""
    library = compiled.library
    weights = [w for layer in program.path for w in library.layers[layer].weights] + list(library.epilogue.weights)
    kv = sum(spec.bytes_per_token() for spec in library.kv_specs(program)) * cached
    return sum(w.numel() * w.element_size() for w in weights) + kv


def time_per_step(samples: dict[str, Any], linked: list[Ours]) -> dict[str, Any]:
    """Decode time per step of each linked program, less the ends: what the line through shortest and longest leaves."""
    by_steps = sorted(linked, key=lambda c: c.steps)
    short, long = by_steps[0], by_steps[-1]

    def median(c: Ours) -> float:
        return statistics.median(samples[c.name]["decode"])

    slope = (median(long) - median(short)) / (long.steps - short.steps)
    ends = median(long) - slope * long.steps
    each = {c.name: (median(c) - ends) / c.steps for c in linked}
    middle = statistics.median(each.values())
    return {"ends_ms": ends, "ms_per_step": each, "largest_deviation": max(abs(v / middle - 1) for v in each.values())}


@torch.no_grad()
def generate_overhead(compiled: CompiledModel, model: PreTrainedModel, ids: Tensor, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per token of whole `generate` calls (greedy), prefill included, beside bare decode of ours."""
    device, generate = ids.device, cast(Any, model.generate)
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def bare() -> None:
        with compiled.session(compiled.default_program, 1) as session:
            token = compiled.prefill(compiled.default_program, session, list(ids))[0].argmax()[None]
            for _ in range(tokens - 1):
                token = compiled.decode(compiled.default_program, session, token).argmax(-1)

    work = {
        "HF generate": lambda: generate(ids, **options),
        "polar_fx generate": lambda: compiled.generate(ids, **options),
        "polar_fx prefill and decode": bare,
    }
    samples: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(rounds):
        for name, call in work.items():
            samples[name].append(timed(call, device) / tokens)
    return {name: spread(values) for name, values in samples.items()}


def linking(compiled: CompiledModel, tokens: int, count: int = 200) -> dict[str, Any]:
    """Milliseconds until a program never seen before is ready for prefill and decode, and what that compiled."""
    pick = random.Random(0)
    shapes = [ShapeClass.of(1, t, compiled.pool.length) for t in (tokens, 1)]
    before, samples = len(compiled.compilations), []
    for _ in range(count):
        start = time.perf_counter()
        program = Program.from_path(tuple(pick.randrange(compiled.depth) for _ in range(compiled.depth)), compiled.depth)
        for shape in shapes:
            compiled.linker.link(program, shape)
        samples.append(1e3 * (time.perf_counter() - start))
    return {"ms": spread(samples), "max_ms": max(samples), "compilations": len(compiled.compilations) - before}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['model']}, {report['dtype']}, batch 1, prompt {report['prompt_tokens']} tokens, "
        f"KV length {report['kv_length']}; "
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads"
        + (f", {report['machine']['gpu']}" if "gpu" in report["machine"] else "")
        + f", torch {report['machine']['torch']}; {report['rounds']} interleaved rounds, medians [quartiles]. "
        f"Measured read bandwidth {report['bandwidth_gbs']:.1f} GB/s.",
        "",
        "| | steps | prefill ms | ratio | decode ms | ratio | GB/s | first calls s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["contenders"]:
        p, d = row["prefill_ms"], row["decode_ms"]
        prefill_ratio, decode_ratio = row["prefill_ratio"]["median"], row["decode_ratio"]["median"]
        lines.append(
            f"| {row['name']} | {row['steps']} | {p['median']:.1f} [{p['p25']:.1f}, {p['p75']:.1f}] | {prefill_ratio:.2f} "
            f"| {d['median']:.1f} [{d['p25']:.1f}, {d['p75']:.1f}] | {decode_ratio:.2f} | {row['decode_gbs']:.1f} "
            f"| {row['first_prefill_s'] + row['first_decode_s']:.1f} |"
        )
    link, step, made = report["linking"], report["time_per_step"], report["generate_ms_per_token"]
    lines += [
        "",
        f"Ratios are to {WHOLE} of the same round. A linked decode spends {step['ends_ms']:.2f} ms in the ends and "
        f"{statistics.median(step['ms_per_step'].values()):.3f} ms in each step; the largest deviation of a program from that is "
        f"{100 * step['largest_deviation']:.1f} %.",
        "",
        f"A new program is ready in {link['ms']['median']:.2f} ms (at most {link['max_ms']:.2f} ms of {link['ms']['n']}) "
        f"and compiles {link['compilations']} regions.",
        "",
        f"Greedy `generate`, ms per token of {report['generate_tokens']}: "
        + ", ".join(f"{name} {value['median']:.1f}" for name, value in made.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or model id (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24, help="decoded tokens a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    with fresh_cache():  # compile times are those of a first run, not of a disk cache
        measure_all(parser.parse_args())


def measure_all(options: argparse.Namespace) -> None:
    """Run everything the options ask for; writes the report."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model, _ = polar_fx.load(options.model, dtype=getattr(torch, options.dtype))
    model.to(options.device).eval()  # type: ignore[arg-type]
    length = -(-(options.prompt_tokens + options.tokens + 40) // 16) * 16
    compiled = polar_fx.compile(model, "inductor", max_length=length - 1)
    plain = polar_fx.compile(model, InductorBackend(passes=()), max_length=length - 1, check=False)
    interpreted = polar_fx.compile(model, "eager", max_length=length - 1, check=False)
    programs = programs_for(compiled.depth)
    linked = [Ours(compiled, label, program) for label, program in programs.items()]
    contenders: list[Contender] = [
        HfEager(model),
        HfCompiled(model, length),
        *linked,
        Ours(plain, "identity, without matvec-to-reduction", programs["identity"]),
        Ours(interpreted, "identity", programs["identity"]),
    ]
    ids = torch.randint(0, 1000, (1, options.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    console = Console(stderr=True)
    print("first calls (compilation included):", file=sys.stderr)
    start = time.perf_counter()
    seconds = first_calls(contenders, ids, device)
    differences = agreement(contenders, ids)
    run_rounds(contenders, ids, 4, 2, device, console)
    bandwidth = bandwidth_gbs(device)
    samples = run_rounds(contenders, ids, options.tokens, options.rounds, device, console)
    reference = samples[contenders[1].name]
    rows = []
    for contender in contenders:
        mine = samples[contender.name]
        program = contender.program if isinstance(contender, Ours) else programs["identity"]
        read = decode_bytes(compiled, program, options.prompt_tokens)
        rows.append({
            "name": contender.name, "steps": contender.steps, **seconds[contender.name],
            "prefill_ms": spread(mine["prefill"]), "decode_ms": spread(mine["decode"]),
            "prefill_ratio": paired_ratio(mine["prefill"], reference["prefill"]),
            "decode_ratio": paired_ratio(mine["decode"], reference["decode"]),
            "decode_bytes": read, "decode_gbs": read / statistics.median(mine["decode"]) / 1e6,
            "max_difference_to_hf": differences.get(contender.name), "samples_ms": mine,
        })  # fmt: skip
    report = {
        "benchmark": "latency", "model": options.model or polar_fx.models.DEFAULT_NAME, "dtype": options.dtype,
        "machine": machine(device), "prompt_tokens": options.prompt_tokens, "decoded_tokens": options.tokens,
        "rounds": options.rounds, "kv_length": length, "bandwidth_gbs": max(bandwidth, bandwidth_gbs(device)), "contenders": rows,
        "capture_s": compiled.library.captured.seconds, "time_per_step": time_per_step(samples, linked),
        "linking": linking(compiled, options.prompt_tokens), "generate_tokens": 32,
        "generate_ms_per_token": generate_overhead(compiled, model, ids, 32, max(3, options.rounds // 3)),
        "total_s": time.perf_counter() - start,
    }  # fmt: skip
    output = options.output or RESULTS / f"latency-{device.type}-{options.dtype}.json"
    write_json(output, report)
    write(output.with_suffix(".md"), table(report))
    print(table(report))


if __name__ == "__main__":
    main()
