"""Random models x random programs x backends, dtypes and ways to call them (fuzz_calls.py), each
against a plain loop over the model's own layers.

    make fuzz MINUTES=60              # seeds count up from 0
    make fuzz SEED=17 CASES=1         # one case again

A case is one random tiny model, compiled once, and some calls of it. Every call is judged by its
distance from the same loop in a wider type, beside the distance of the plain loop in the model's
own type. Needs tests/support in PYTHONPATH.
"""

import argparse
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import polar_fx
from fuzz_calls import WIDER, Judge, Setting, call
from measure import RESULTS, machine, write_json
from polar_fx.backends import get_backend
from tiny_models import make

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
}
_PLAIN = (
    *("llama", "qwen3", "gpt2", "gpt_neox", "opt", "phi", "olmo2", "glm4"),
    *("mistral", "gemma2", "gemma3_text", "cohere2", "starcoder2", "bloom"),
)
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN},
    "phi3": dict(rope_parameters=_LONGROPE, original_max_position_embeddings=16),
    "mixtral": {},
    "qwen3_moe": {},
}
# a rounding error may send a token to another expert, which no tolerance covers
_EXPERTS = ("mixtral", "qwen3_moe")
_BACKENDS = ("eager", "eager", "inductor", "aot_inductor")
_FLAGS = ("deterministic", "slots", "at_limit")
_CALLS = {"eager": 12, "inductor": 30, "aot_inductor": 30}


@dataclass(frozen=True)
class Case:
    """What one seed stands for, but for its calls."""

    seed: int
    family: str
    backend: str
    dtype: torch.dtype
    max_length: int
    prefill_chunk: int
    deterministic: bool
    slots: bool  # keys and values in slots, as in bundles, and not in blocks
    at_limit: bool  # the model knows no positions beyond max_length

    @classmethod
    def of(cls, seed: int) -> "Case":
        rng = random.Random(seed)
        family = rng.choice(list(FAMILIES))
        dtypes = [torch.float32] if family in _EXPERTS else list(WIDER)
        return cls(
            seed,
            family,
            rng.choice(_BACKENDS),
            rng.choice(dtypes),
            rng.choice((31, 40, 47)),
            rng.choice((3, 7, 16, 64)),
            rng.random() < 0.15,
            rng.random() < 0.2,
            rng.random() < 0.5,
        )

    def model(self) -> PreTrainedModel:
        options: dict[str, Any] = {"num_hidden_layers": 3, **FAMILIES[self.family]}
        if self.at_limit:
            options["max_position_embeddings"] = self.max_length
        model = make(self.family, **options)
        # weights alone, as loading does: rotary frequencies stay as they are
        for weight in model.parameters():
            weight.data = weight.data.to(self.dtype)
        return model

    def __str__(self) -> str:
        flags = [name for name in _FLAGS if getattr(self, name)]
        sizes = f"max_length={self.max_length} prefill_chunk={self.prefill_chunk}"
        return " ".join((f"seed {self.seed}:", self.family, self.way, sizes, *flags))

    @property
    def way(self) -> str:
        """Backend and dtype."""
        return f"{self.backend} {str(self.dtype).removeprefix('torch.')}"


def run(case: Case) -> dict[str, Any]:
    """A case as JSON values: `worst` over its calls, those that failed, and an error if one ended
    it.
    """
    start, rng = time.perf_counter(), random.Random(f"calls {case.seed}")
    calls: list[dict[str, Any]] = []
    error = None
    try:
        model = case.model()
        judge = Judge(model, case.family in _EXPERTS)
        backend = get_backend(case.backend)
        if case.slots:
            vars(backend)["by_address"] = False
        compiled = polar_fx.compile(
            model,
            backend,
            max_length=case.max_length,
            prefill_chunk=case.prefill_chunk,
            deterministic=case.deterministic,
            cache=False,
            workers=1,
        )
        setting = Setting(compiled, judge, rng, case.max_length)
        for _ in range(_CALLS[case.backend]):
            calls.append(call(setting))
    except Exception as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}".partition("\n")[0]
    failed = [c for c in calls if not c["worst"] <= 1]
    return {
        "case": str(case),
        "way": case.way,
        "seconds": time.perf_counter() - start,
        "calls": [c["kind"] for c in calls],
        "worst": worst_of(calls),
        "failed": failed,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, help="how many, whatever the time")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * arguments.minutes
    while len(found) < arguments.cases if arguments.cases else time.monotonic() < end:
        case = Case.of(arguments.seed + len(found))
        found.append(run(case))
        bad = found[-1]["error"] or found[-1]["failed"]
        count, worst = len(found[-1]["calls"]), found[-1]["worst"]
        print(f"{case}: {count} calls, worst {worst:.2f}", flush=True)
        if bad:
            print(f"  FAILED; again with: make fuzz SEED={case.seed} CASES=1\n  {bad}", flush=True)
    result = summary(found)
    write_json(arguments.out, {"first_seed": arguments.seed, **result})
    failed = len(result["failed"])
    print(f"{len(found)} cases, {result['calls']} calls, {failed} cases failed; {arguments.out}")
    raise SystemExit(bool(failed))


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What ran, how often and with what result, as JSON values."""
    calls = Counter(kind for f in found for kind in f["calls"])
    ways = Counter(f["way"] for f in found)
    seconds = sum(f["seconds"] for f in found)
    return {
        "machine": machine(torch.device("cpu")),
        "cases": len(found),
        "calls": calls.total(),
        "calls_of_kind": calls,
        "cases_of_way": ways,
        "worst": worst_of(found),
        "seconds": seconds,
        "failed": [f for f in found if f["error"] or f["failed"]],
    }


def worst_of(found: list[dict[str, Any]]) -> float:
    """The largest difference of calls or cases, as a multiple of what is allowed."""
    return max((f["worst"] for f in found), default=0.0)


if __name__ == "__main__":
    main()
