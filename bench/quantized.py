"""Decoding with weights in bfloat16, int8 and int4, and what quantizing costs in quality.

    python bench/quantized.py --threads 2                 # SmolLM2-135M-Instruct
    python bench/quantized.py --rows 1 8 --rounds 4 --tokens 6 --no-quality  # a quick look
    python bench/quantized.py --peers FOLDER --threads 2  # llama.cpp's, of the same weights, beside

Every round runs each way at each number of rows once, in a shuffled order, in one process: prefill
of the prompts, then decoding of the following tokens. `--peers` names a folder with llama-bench and
GGUF files (*.gguf) of the same model; each file runs once a round, one row, in turn with ours.

Quality is measured on the text of docs/ in this repository, which no model has seen: perplexity,
how often the likeliest token is bfloat16's, and the divergence from bfloat16's probabilities.
Shape legend: B rows, T tokens, V vocabulary.
"""

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import polar_fx
from contenders import Contender, Ours
from measure import RESULTS, bandwidth_gbs, machine, paired_ratio, spread
from polar_fx.quantized import Quantize
from polar_fx.store import ArtifactStore
from small_batches import Samples, add_arguments, measured, write_report

CPU = torch.device("cpu")
WAYS: tuple[Quantize | None, ...] = (None, "int8", "int4")
TEXTS = ("design.md", "engine.md", "search.md", "export.md")
DOCS = Path(__file__).parent.parent / "docs"


def name_of(way: str | None) -> str:
    return way or "bfloat16"


def num_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's weights, each once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def windows_of(tokenizer: Any, *, count: int, tokens: int) -> tuple[Tensor, str]:
    """Token ids i64[count, tokens] of this repository's documents, and the sha256 of their text."""
    text = "\n\n".join((DOCS / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    count = min(count, len(ids) // tokens)
    return ids[: count * tokens].view(count, tokens), hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def probabilities(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Logarithms of the model's probabilities [count, T, V], in bfloat16 to save memory."""
    found = [model(row[None]).logits.float().log_softmax(-1).bfloat16() for row in windows]
    return torch.cat(found)


def quality(mine: Tensor, theirs: Tensor, *, windows: Tensor) -> dict[str, float]:
    """Of log-probabilities `mine`, beside those of the model that was not quantized."""
    chances: list[Tensor] = []
    divergences: list[float] = []
    for a, b, row in zip(mine, theirs, windows, strict=True):
        a, b = a.float(), b.float()
        chances.append(a[:-1].gather(-1, row[1:, None]))
        divergences.append(float((b.exp() * (b - a)).sum(-1).mean()))
    same = (mine.argmax(-1) == theirs.argmax(-1)).float().mean()
    return {
        "perplexity": float((-torch.cat(chances).mean()).exp()),
        "same_likeliest_token": float(same),
        "divergence": sum(divergences) / len(divergences),
        "n": sum(c.numel() for c in chances),
    }


def peers(folder: Path | None, *, rounds: int, tokens: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds of llama.cpp's decoded token in each round, by GGUF file."""
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    found: dict[str, list[float]] = {file.stem: [] for file in files}
    for _ in range(rounds):
        for file in files:
            assert folder is not None
            command = [str(folder / "llama-bench"), "-m", str(file), "-t", str(threads), "-p", "0"]
            command += ["-n", str(tokens), "-r", "1", "-o", "json"]
            told = subprocess.run(command, capture_output=True, text=True, check=True)
            found[file.stem].append(1e3 / json.loads(told.stdout)[0]["avg_ts"])
    sizes = {file.stem: file.stat().st_size for file in files}
    return [
        {"name": name, "bytes": sizes[name], "decode_ms": spread(times), "samples_ms": times}
        for name, times in found.items()
    ]


def rows_of(samples: Samples) -> list[dict[str, Any]]:
    """What the report says of each way at each number of rows; ratios are of the same round."""
    reference = name_of(None)
    return [
        {
            "name": name,
            "rows": count,
            "decode_ms": spread(mine["decode"]),
            "prefill_ms": spread(mine["prefill"]),
            "to_bfloat16": paired_ratio(mine["decode"], samples[reference, count]["decode"]),
            "prefill_to_bfloat16": paired_ratio(
                mine["prefill"], samples[reference, count]["prefill"]
            ),
            "to_one_row": paired_ratio(mine["decode"], samples[name, 1]["decode"]),
            "samples_ms": mine,
        }
        for (name, count), mine in samples.items()
    ]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    about = report["machine"]
    lines = [
        f"{report['model']}, prompts of {report['prompt_tokens']} tokens; {about['cpu']}, "
        f"{about['threads']} threads, torch {about['torch']}, commit {about['commit']}; "
        f"{report['rounds']} interleaved rounds, medians [quartiles]. Load of the machine before "
        f"and after: {report['load_average'][0]:.1f}, {report['load_average'][1]:.1f}.",
        "",
        "| rows | weights | decode ms | of bfloat16 | of one row | prefill ms | of bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(report["contenders"], key=lambda r: r["rows"]):
        decode, prefill = row["decode_ms"], row["prefill_ms"]
        lines.append(
            f"| {row['rows']} | {row['name']} | {decode['median']:.2f} [{decode['p25']:.2f}, "
            f"{decode['p75']:.2f}] | {row['to_bfloat16']['median']:.2f} | "
            f"{row['to_one_row']['median']:.2f} | {prefill['median']:.0f} | "
            f"{row['prefill_to_bfloat16']['median']:.2f} |"
        )
    for peer in report["llama.cpp"]:
        decode = peer["decode_ms"]
        lines.append(
            f"| 1 | llama.cpp {peer['name']}, {peer['bytes'] / 1e6:.0f} MB | "
            f"{decode['median']:.2f} [{decode['p25']:.2f}, {decode['p75']:.2f}] | | | | |"
        )
    if report["quality"]:
        lines += [
            "",
            "| weights | MB | perplexity | same likeliest token | divergence | n |",
            "|---|---|---|---|---|---|",
        ]
    for name, found in report["quality"].items():
        lines.append(
            f"| {name} | {report['weight_bytes'][name] / 1e6:.0f} | {found['perplexity']:.2f} | "
            f"{found['same_likeliest_token']:.3f} | {found['divergence']:.4f} | {found['n']} |"
        )
    return "\n".join(lines) + "\n"


def measure_all(options: argparse.Namespace, store: ArtifactStore) -> None:
    """Run everything the options ask for; writes the report."""
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    contenders: dict[str, Contender] = {}
    sizes: dict[str, int] = {}
    found: dict[str, dict[str, float]] = {}
    reference, digest = torch.empty(0), ""
    for way in WAYS:
        model, tokenizer = polar_fx.load(options.model, torch.bfloat16, quantize=way)
        sizes[name_of(way)] = num_bytes(model)
        if options.quality:
            windows, digest = windows_of(tokenizer, count=options.windows, tokens=512)
            mine = probabilities(model, windows)
            reference = mine if way is None else reference
            found[name_of(way)] = quality(mine, reference, windows=windows)
        compiled = polar_fx.compile(model, cache=store, check=False)
        contenders[name_of(way)] = Ours(compiled, name_of(way), program=compiled.default_program)
    _, samples = measured(contenders, options)
    theirs = peers(
        options.peers, rounds=options.rounds, tokens=options.tokens, threads=torch.get_num_threads()
    )
    report = {
        "benchmark": "quantized",
        "model": options.model or polar_fx.models.DEFAULT_NAME,
        "machine": machine(CPU),
        "load_average": [load, os.getloadavg()[0]],
        "prompt_tokens": options.prompt_tokens,
        "decoded_tokens": options.tokens,
        "rounds": options.rounds,
        "bandwidth_by_operator_gbs": bandwidth_gbs(CPU),
        "weight_bytes": sizes,
        "quality": found,
        "quality_text_sha256": digest,
        "contenders": rows_of(samples),
        "llama.cpp": theirs,
    }
    output = options.output or RESULTS / "quantized-cpu.json"
    write_report(output, report, table=table(report))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, tokens=16)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for quality")
    parser.add_argument("--no-quality", dest="quality", action="store_false")
    parser.add_argument("--peers", type=Path, help="folder of llama-bench and GGUF files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure_all(options, ArtifactStore(options.store or Path(place)))


if __name__ == "__main__":
    main()
