"""Kill a process that captures, compiles and stores, again and again at random moments; the store
must stay clean.

    python bench/kill_compile.py --kills 100

Each process compiles a small random model for a KV length no other process used, so there is always
something to make. After each kill every stored file is hashed again; at the end one process runs
undisturbed on the same store.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from measure import RESULTS, machine, write_json
from polar_fx.store import ArtifactStore

_COMPILE = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import polar_fx
from polar_fx.store import ArtifactStore

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
).eval()
compiled = polar_fx.compile(
    model, max_length=int(sys.argv[2]), cache=ArtifactStore(Path(sys.argv[1]))
)
compiled.warmup()
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    difference = (compiled.forward(ids) - model(ids).logits).abs().max()
print(len(compiled.compilations), float(difference))
"""


def start(store: str, max_length: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _COMPILE, store, str(max_length)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS / "kill-compile-cpu.json")
    options = parser.parse_args()
    pick = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        start(folder, 31).communicate()
        whole_s = time.perf_counter() - began  # undisturbed, nothing cached
        kills, refused, entries = [], [], []
        for number in track(
            range(options.kills), description="kills", console=Console(stderr=True)
        ):
            process = start(folder, 47 + 16 * number)
            moment = pick.uniform(0, whole_s)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                # the whole group (as a machine that goes down), or the parent alone (as an
                # out-of-memory killer)
                (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
                process.wait()
                kills.append(moment)
            refused += [f"{r.key[:12]}: {r.reason}" for r in ArtifactStore(Path(folder)).verify()]
            entries.append(len(ArtifactStore(Path(folder)).entries()))
        answer, _ = start(folder, 47).communicate()
        compiled, difference = answer.split()
        refused += [f"{r.key[:12]}: {r.reason}" for r in ArtifactStore(Path(folder)).verify()]
        report = {
            "benchmark": "kill compile",
            "machine": machine(torch.device("cpu")),
            "undisturbed_s": whole_s,
            "kills": len(kills),
            "moments_s": kills,
            "refused": refused,
            "entries_after_each": entries,
            "afterwards": {"compiled": int(compiled), "max_difference_to_hf": float(difference)},
        }
    write_json(options.output, report)
    print(
        f"{len(kills)} kills within {whole_s:.0f} s of a start: {len(refused)} entries refused by "
        f"verify, {entries[-1]} stored; afterwards {compiled} regions were compiled and logits "
        f"differ from the model by {float(difference):.1e}"
    )


if __name__ == "__main__":
    main()
