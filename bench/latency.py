"""Prefill and decode latency: HF eager, whole-model torch.compile with a static cache, and
polar_fx.

    python bench/latency.py                       # SmolLM2-135M-Instruct, fp32
    python bench/latency.py --rounds 4 --tokens 8 # a quick look
    python bench/latency.py --threads 1 --dtype bfloat16 --output bench/results/mine.json

Every round runs each contender once, in a shuffled order, in one process: prefill of one prompt,
then decoding of the following tokens. Compile times are reported apart. Shape legend: B batch, T
tokens.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import PreTrainedModel

import polar_fx
from contenders import WHOLE, Contender, HfCompiled, HfEager, Ours, WithoutLastStep, programs_of
from measure import RESULTS, bandwidth_gbs, machine, paired_ratio, spread, timed, write, write_json
from polar_fx import CompiledModel, Program
from polar_fx.backends import AotInductorBackend, Backend, InductorBackend
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.passes.attention_over_blocks import AttentionOverBlocks
from polar_fx.passes.base import Pass
from polar_fx.passes.linear_to_row_kernel import LinearToRowKernel
from polar_fx.store import ArtifactStore


@torch.no_grad()
def first_calls(
    contenders: list[Contender], ids: Tensor, *, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds of the first prefill and decode of each contender, compilation included."""
    seconds: dict[str, dict[str, float]] = {}
    for contender in contenders:
        times = {"first_prefill_s": timed(lambda c=contender: c.prefill(ids), device) / 1e3}
        times["first_decode_s"] = timed(lambda c=contender: c.decode(ids[:, :1]), device) / 1e3
        contender.decode(ids[:, :1])
        contender.finish()
        seconds[contender.name] = times
        print(
            f"  {contender.name}: {times['first_prefill_s']:.2f} s + "
            f"{times['first_decode_s']:.2f} s",
            file=sys.stderr,
        )
    return seconds


@torch.no_grad()
def agreement(contenders: list[Contender], ids: Tensor) -> dict[str, float]:
    """Largest absolute logit difference to the first contender (HF eager), for those that run every
    layer once.
    """
    found: dict[str, float] = {}
    reference: list[Tensor] = []
    for contender in contenders:
        if isinstance(contender, Ours) and not contender.program.is_identity:
            continue
        logits = [contender.prefill(ids).clone(), contender.decode(ids[:, :1]).clone()]
        contender.finish()
        reference = reference or logits
        found[contender.name] = max(
            float((a - b).abs().max()) for a, b in zip(logits, reference, strict=True)
        )
    return found


@torch.no_grad()
def run_rounds(
    contenders: list[Contender],
    ids: Tensor,
    *,
    tokens: int,
    rounds: int,
    device: torch.device,
    console: Console,
) -> dict[str, dict[str, list[float]]]:
    """Per contender: one prefill time a round, and the round's median decode time per token, in
    milliseconds.
    """
    samples: dict[str, dict[str, list[float]]] = {
        c.name: {"prefill": [], "decode": []} for c in contenders
    }
    following = torch.randint(
        0, 1000, (tokens, ids.shape[0], 1), generator=torch.Generator().manual_seed(1)
    ).to(device)
    order = random.Random(0)
    for _ in track(range(rounds), description="rounds", console=console):
        for contender in order.sample(contenders, len(contenders)):
            times = samples[contender.name]
            times["prefill"].append(timed(lambda c=contender: c.prefill(ids), device))
            each = [timed(lambda c=contender, t=token: c.decode(t), device) for token in following]
            times["decode"].append(statistics.median(each))
            contender.finish()
    return samples


def decode_bytes(compiled: CompiledModel, program: Program, *, cached: int) -> int:
    """Bytes one decoded token must read at least: weights of every step and of the head, and the
    cached KV.
    """
    library = compiled.library
    weights = [w for layer in program.path for w in library.layers[layer].weights] + list(
        library.epilogue.weights
    )
    kv = sum(spec.bytes_per_token() for spec in library.kv_specs(program)) * cached
    return sum(w.numel() * w.element_size() for w in weights) + kv


def linear_fit(samples: dict[str, Any], linked: list[Ours], *, phase: str) -> dict[str, Any]:
    """Least-squares fit of the medians, t = ends + steps * step, with each program's relative
    residual.
    """
    steps = np.array([c.steps for c in linked], dtype=float)
    times = np.array([statistics.median(samples[c.name][phase]) for c in linked])
    # weighted: every program counts alike
    relative = np.stack([np.ones_like(steps), steps], 1) / times[:, None]
    (ends, step), *_ = np.linalg.lstsq(relative, np.ones_like(times), rcond=None)
    residuals = (ends + step * steps) / times - 1
    half = {
        c.name: float((t - ends) / (times[0] - ends))
        for c, t in zip(linked, times, strict=True)
        if c.steps * 2 == linked[0].steps
    }
    return {
        "ends_ms": ends,
        "step_ms": step,
        "largest_residual": float(np.abs(residuals).max()),
        "residuals": {c.name: float(r) for c, r in zip(linked, residuals, strict=True)},
        "half_of_the_steps": half,
    }


@torch.no_grad()
def generate_overhead(
    compiled: CompiledModel, model: PreTrainedModel, *, ids: Tensor, tokens: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds per token of whole `generate` calls (greedy), prefill included, beside bare
    decode of ours.
    """
    device, generate = ids.device, cast(Any, model.generate)
    options: dict[str, Any] = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

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


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['model']}, {report['dtype']}, batch 1, prompt {report['prompt_tokens']} tokens, "
        f"KV length {report['kv_length']}; "
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads"
        + (f", {report['machine']['gpu']}" if "gpu" in report["machine"] else "")
        + (
            f", torch {report['machine']['torch']}; {report['rounds']} interleaved rounds, medians "
            "[quartiles]. Measured read bandwidth: "
        )
        + ", ".join(f"{name} {v:.1f}" for name, v in report["bandwidth_by_operator_gbs"].items())
        + " GB/s; percentages are of the fastest.",
        "",
        "| | steps | prefill ms | ratio | decode ms | ratio | GB/s | of bandwidth | first calls s "
        "|",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["contenders"]:
        p, d = row["prefill_ms"], row["decode_ms"]
        prefill_ratio, decode_ratio = row["prefill_ratio"]["median"], row["decode_ratio"]["median"]
        lines.append(
            f"| {row['name']} | {row['steps']} | {p['median']:.1f} [{p['p25']:.1f}, "
            f"{p['p75']:.1f}] | {prefill_ratio:.2f} | {d['median']:.2f} [{d['p25']:.2f}, "
            f"{d['p75']:.2f}] | {decode_ratio:.2f} | {row['decode_gbs']:.1f} | "
            f"{100 * row['decode_gbs'] / report['bandwidth_gbs']:.0f} % | "
            f"{row['first_prefill_s'] + row['first_decode_s']:.1f} |"
        )
    made = report["generate_ms_per_token"]
    lines += [
        "",
        f"Ratios are to {WHOLE} of the same round; first calls run against empty caches.",
        "",
    ]
    for phase in ("prefill", "decode"):
        fit = report["linear_fit"][phase]
        half = ", ".join(f"{r:.3f}" for r in fit["half_of_the_steps"].values())
        lines += [
            f"Linked {phase}: t = {fit['ends_ms']:.2f} ms + steps × {fit['step_ms']:.3f} ms, "
            f"largest residual {100 * fit['largest_residual']:.1f} %; without the ends, half the "
            f"steps take {half} of identity's time.",
            "",
        ]
    lines.append(
        f"Greedy `generate`, ms per token of {report['generate_tokens']}: "
        + ", ".join(f"{name} {value['median']:.1f}" for name, value in made.items())
        + "."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder or model id (default: the embedded SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24, help="decoded tokens a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    # compile times are those of a first run
    with fresh_cache(), tempfile.TemporaryDirectory() as store:
        measure_all(parser.parse_args(), ArtifactStore(Path(store)))


def make_contenders(
    model: PreTrainedModel, length: int, *, store: ArtifactStore
) -> tuple[CompiledModel, list[Contender]]:
    """The compiled model that is judged, and everything it is compared with; the first is HF
    eager.
    """
    on_cpu = model.device.type == "cpu"

    def compiled(backend: str | Backend = "auto", **options: Any) -> CompiledModel:
        return polar_fx.compile(
            model, backend, max_length=length - 1, check=False, cache=store, **options
        )

    def without(kind: type[Pass]) -> Backend:
        return AotInductorBackend(passes=[p for p in REGION_PASSES if not isinstance(p, kind)])

    chosen = compiled()
    programs = programs_of(chosen.depth)
    identity = programs["identity"]
    linked = [Ours(chosen, label, program=program) for label, program in programs.items()]
    contenders = [
        HfEager(model),
        HfCompiled(model, length),
        *linked,
        WithoutLastStep(chosen, "last step for all tokens", program=identity),
    ]
    if on_cpu:
        contenders += [
            Ours(compiled(tier="whole"), "identity as one graph", program=identity),
            Ours(
                compiled(AotInductorBackend(passes=())), "without region passes", program=identity
            ),
            Ours(
                compiled(without(LinearToRowKernel)),
                "linears as sums of products",
                program=identity,
            ),
            Ours(
                compiled(without(AttentionOverBlocks)),
                "attention as sums of products",
                program=identity,
            ),
            Ours(compiled(InductorBackend()), "inductor (in-process) regions", program=identity),
        ]
    return chosen, [*contenders, Ours(compiled("eager"), "eager", program=identity)]


def timings(
    mine: dict[str, list[float]], reference: dict[str, list[float]], *, read: int
) -> dict[str, Any]:
    """Of a contender's samples in ms, beside those of the reference; a decode reads `read`
    bytes.
    """
    return {
        "prefill_ms": spread(mine["prefill"]),
        "decode_ms": spread(mine["decode"]),
        "prefill_ratio": paired_ratio(mine["prefill"], reference["prefill"]),
        "decode_ratio": paired_ratio(mine["decode"], reference["decode"]),
        "decode_bytes": read,
        "decode_gbs": read / statistics.median(mine["decode"]) / 1e6,
        "samples_ms": mine,
    }


def measure_all(options: argparse.Namespace, store: ArtifactStore) -> None:
    """Run everything the options ask for; writes the report."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model, _ = polar_fx.load(options.model, dtype=getattr(torch, options.dtype))
    model.to(options.device).eval()  # type: ignore[arg-type]
    length = -(-(options.prompt_tokens + options.tokens + 40) // 16) * 16
    compiled, contenders = make_contenders(model, length, store=store)
    linked = [c for c in contenders if type(c) is Ours and c.compiled is compiled]
    ids = torch.randint(
        0, 1000, (1, options.prompt_tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)
    console = Console(stderr=True)
    print("first calls (compilation included):", file=sys.stderr)
    start = time.perf_counter()
    seconds = first_calls(contenders, ids, device=device)
    differences = agreement(contenders, ids)
    run_rounds(contenders, ids, tokens=4, rounds=2, device=device, console=console)
    bandwidth = bandwidth_gbs(device)
    tokens, rounds = options.tokens, options.rounds
    samples = run_rounds(
        contenders, ids, tokens=tokens, rounds=rounds, device=device, console=console
    )
    bandwidth = {name: max(value, bandwidth[name]) for name, value in bandwidth_gbs(device).items()}
    reference = samples[contenders[1].name]
    rows = []
    for contender in contenders:
        program = contender.program if isinstance(contender, Ours) else compiled.default_program
        read = decode_bytes(compiled, program, cached=options.prompt_tokens)
        row = {"name": contender.name, "steps": contender.steps, **seconds[contender.name]}
        row |= timings(samples[contender.name], reference, read=read)
        row["max_difference_to_hf"] = differences.get(contender.name)
        rows.append(row)
    report = {
        "benchmark": "latency",
        "model": options.model or polar_fx.models.DEFAULT_NAME,
        "dtype": options.dtype,
        "machine": machine(device),
        "prompt_tokens": options.prompt_tokens,
        "decoded_tokens": options.tokens,
        "rounds": options.rounds,
        "kv_length": length,
        "contenders": rows,
        "bandwidth_gbs": max(bandwidth.values()),
        "bandwidth_by_operator_gbs": bandwidth,
        "linear_fit": {
            phase: linear_fit(samples, linked, phase=phase) for phase in ("prefill", "decode")
        },
        "generate_tokens": 32,
        "generate_ms_per_token": generate_overhead(
            compiled, model, ids=ids, tokens=32, rounds=max(3, options.rounds // 3)
        ),
        "total_s": time.perf_counter() - start,
    }
    output = options.output or RESULTS / f"latency-{device.type}-{options.dtype}.json"
    write_json(output, report)
    write(output.with_suffix(".md"), table(report))
    print(table(report))


if __name__ == "__main__":
    main()
