"""Process start to first token: HF eager, and polar_fx with its artifact store filled.

    python bench/warm_start.py --rounds 10

Each round starts one fresh process of each kind, in shuffled order: imports, loading the model, a
prompt of 128 tokens, one token. A first polar_fx process fills the store and is reported apart.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, paired_ratio, spread, write_json

_COMMON = """
import json, time, sys
start = float(sys.argv[1])
import torch, polar_fx
dtype = getattr(torch, sys.argv[2])
model, _ = polar_fx.load(dtype=dtype)
loaded = time.time()
ids = torch.randint(0, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
"""
_HF = """
with torch.no_grad():
    token = int(model(ids, logits_to_keep=1).logits[0, -1].argmax())
print(
    json.dumps({"first_token_s": time.time() - start, "loaded_s": loaded - start, "token": token})
)
"""
_OURS = """
from pathlib import Path
from polar_fx.store import ArtifactStore

compiled = polar_fx.compile(model, max_length=255, cache=ArtifactStore(Path(sys.argv[3])))
made = time.time()
with compiled.session(compiled.default_program, 1) as session:
    token = int(compiled.prefill(compiled.default_program, session, list(ids))[0].argmax())
print(
    json.dumps(
        {
            "first_token_s": time.time() - start,
            "loaded_s": loaded - start,
            "compile_call_s": made - loaded,
            "token": token,
            "compiled": len(compiled.compilations),
            "regions": len(compiled.regions.records),
            "traced": compiled.library.is_traced,
        }
    )
)
"""


def run(code: str, *arguments: str) -> dict[str, Any]:
    """One fresh process; seconds count from before it starts."""
    command = [sys.executable, "-c", _COMMON + code, repr(time.time()), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def first_tokens_s(samples: list[dict[str, Any]]) -> list[float]:
    return [sample["first_token_s"] for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "warm-start-cpu.json")
    options = parser.parse_args()
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as store:
        cold = run(_OURS, options.dtype, store)
        run(_HF, options.dtype)
        kinds = {"HF eager": (_HF, options.dtype), "polar_fx": (_OURS, options.dtype, store)}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name in order.sample(list(kinds), len(kinds)):
                runs[name].append(run(*kinds[name]))
    import torch

    hf, ours = first_tokens_s(runs["HF eager"]), first_tokens_s(runs["polar_fx"])
    compiled = sum(r["compiled"] for r in runs["polar_fx"])
    traced = sum(r["traced"] for r in runs["polar_fx"])
    report = {
        "benchmark": "warm start",
        "dtype": options.dtype,
        "machine": machine(torch.device("cpu")),
        "cold": cold,
        "first_token_s": {"HF eager": spread(hf), "polar_fx": spread(ours)},
        "more_than_hf_s": statistics.median(b - a for a, b in zip(hf, ours, strict=True)),
        "ratio": paired_ratio(ours, hf),
        "compiled_in_warm_processes": compiled,
        "traced_in_warm_processes": traced,
        "runs": runs,
    }
    write_json(options.output, report)
    medians = {name: value["median"] for name, value in report["first_token_s"].items()}
    print(
        f"process start to first token: HF eager {medians['HF eager']:.2f} s, polar_fx "
        f"{medians['polar_fx']:.2f} s ({report['more_than_hf_s']:+.2f} s), "
        f"{report['compiled_in_warm_processes']} regions compiled, "
        f"{report['traced_in_warm_processes']} captures traced in {options.rounds} processes; "
        f"cold {cold['first_token_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
