"""Decode and prefill of hybrids at real sizes, beside HuggingFace eager.

Models with recurrent or convolutional layers beside attention, under a billion parameters, with
the sizes of published ones and random weights. The times of both take turns in one run; compiling
is apart.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import polar_fx
from measure import machine, write_json
from polar_fx.cli.bench import about_run, contenders_of, measured, text_of
from polar_fx.cli.threads import load_of_others

# Sizes of Qwen3.5-0.8B, Granite-4.0-H-350M and LFM2-350M, as their configurations have them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": (
        "qwen3_5_text",
        dict(
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            tie_word_embeddings=True,
        ),
    ),
    "granite-4": (
        "granitemoehybrid",
        dict(
            hidden_size=768,
            intermediate_size=2048,
            shared_intermediate_size=2048,
            num_hidden_layers=32,
            layer_types=["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)],
            num_attention_heads=12,
            num_key_value_heads=4,
            num_local_experts=0,
            num_experts_per_tok=0,
            mamba_n_heads=48,
            mamba_d_head=32,
            mamba_d_state=128,
            vocab_size=100352,
            position_embedding_type="nope",
            tie_word_embeddings=True,
            max_position_embeddings=32768,
        ),
    ),
    "lfm2": (
        "lfm2",
        dict(
            hidden_size=1024,
            intermediate_size=6656,
            num_hidden_layers=16,
            num_attention_heads=16,
            full_attn_idxs=[2, 5, 8, 10, 12, 14],
        ),
    ),
}


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="(default: all)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.set_defaults(program=None)  # the identity
    options = parser.parse_args()
    found = []
    for name in options.model or MODELS:
        found.append(beside_itself(name, options))
        print("\n".join(text_of(found[-1], found[-1]["results"])), flush=True)
        print(told(found[-1]), flush=True)
        if options.out is not None:
            write_json(options.out, {"machine": machine(torch.device("cpu")), "models": found})


def beside_itself(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model, compiled and in HuggingFace, as the command `bench` measures them."""
    model, load = random_model(name, options.dtype), load_of_others()
    began = time.perf_counter()
    length = 1 << (options.prompt_tokens + options.new_tokens - 1).bit_length()
    compiled = polar_fx.compile(model, max_length=length)
    captured_s = time.perf_counter() - began
    contenders = contenders_of(options, model, compiled=compiled, name="")
    compiled_s = time.perf_counter() - began - captured_s
    lines = []
    for rows in options.rows:
        lines += measured(options, contenders, rows=rows, vocab_size=compiled.vocab_size)
    kinds = {call.target for call in compiled.library.layers}
    return {
        **about_run(options, compiled, load=load),
        "name": name,
        "layer_kinds": len(kinds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "capture_s": captured_s,
        "compile_s": compiled_s,
        "results": lines,
    }


def random_model(name: str, dtype: str) -> Any:
    """A model of this size with drawn weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def told(found: dict[str, Any]) -> str:
    """What was captured and compiled, in one line."""
    return (
        f"{found['name']}: {found['parameters'] / 1e6:.0f} M parameters, {found['layers']} layers "
        f"of {found['layer_kinds']} kinds, captured in {found['capture_s']:.0f} s\n"
    )


if __name__ == "__main__":
    main()
