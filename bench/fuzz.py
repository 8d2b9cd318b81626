"""Random models x random programs x backends, dtypes, ragged rows, parts of prompts and decoding,
each against a plain loop over the model's own layers.

    make fuzz MINUTES=60              # seeds count up from 0
    make fuzz SEED=17 CASES=1         # one case again

A case is one random tiny model, compiled once, and some calls of it. Every call is judged by its
distance from the same loop in a wider type, beside the distance of the plain loop in the model's
own type. Needs tests/support in PYTHONPATH.
"""

import argparse
import copy
import random
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import polar_fx
from measure import RESULTS, machine, write_json
from plain_loop import plain_logits
from polar_fx.capture.rotary import frequency_switch
from polar_fx.compiled import CompiledModel
from polar_fx.program import Program
from polar_fx.runtime.generator import padded_rows
from tiny_models import make

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "qwen3", "gpt2", "gpt_neox", "opt", "phi", "olmo2", "glm4")},
    **{name: {} for name in ("mistral", "gemma2", "gemma3_text", "cohere2", "starcoder2", "bloom")},
    "phi3": dict(rope_parameters=_LONGROPE, original_max_position_embeddings=16),
    "mixtral": {},
    "qwen3_moe": {},
}
# a rounding error may send a token to another expert, which no tolerance covers
_EXPERTS = ("mixtral", "qwen3_moe")
_BACKENDS = ("eager", "eager", "inductor", "aot_inductor")
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
# of the largest logit, beside what the plain loop itself loses
_FLOOR = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
_TIMES = 6.0
_CALLS = {"eager": 8, "inductor": 10, "aot_inductor": 10}


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

    @classmethod
    def of(cls, seed: int) -> "Case":
        rng = random.Random(seed)
        family = rng.choice(list(FAMILIES))
        dtypes = [torch.float32] if family in _EXPERTS else list(_WIDER)
        return cls(
            seed,
            family,
            rng.choice(_BACKENDS),
            rng.choice(dtypes),
            rng.choice((31, 40, 47)),
            rng.choice((3, 7, 16, 64)),
            rng.random() < 0.15,
        )

    def model(self) -> PreTrainedModel:
        model = make(self.family, **{"num_hidden_layers": 3, **FAMILIES[self.family]})
        # weights alone, as loading does: rotary frequencies stay as they are
        for weight in model.parameters():
            weight.data = weight.data.to(self.dtype)
        return model

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.family} {self.backend} "
            f"{str(self.dtype).removeprefix('torch.')} max_length={self.max_length} "
            f"prefill_chunk={self.prefill_chunk}{' deterministic' if self.deterministic else ''}"
        )


def random_program(rng: random.Random, depth: int) -> Program:
    """Runs of layers, skipped, repeated and damped in one another."""
    text = ""
    for _ in range(rng.randint(1, 3)):
        part = " ".join(str(rng.randrange(depth)) for _ in range(rng.randint(1, 3)))
        damping = rng.choice(("0.25", "0.5", "0.9"))
        forms = (part, part, f"({part})*2", f"({part})*2@{damping}", f"[{part}]@{damping}")
        text += f" {rng.choice(forms)}"
    if rng.random() < 0.2:
        text = f"0 ({text})*2@0.5"
    return Program.parse(text if rng.random() < 0.9 else "identity", depth)


class Judge:
    """Says how far logits are from the plain loop, as a part of what is allowed: 1 is the limit."""

    def __init__(self, model: PreTrainedModel, experts: bool = False) -> None:
        dtype: torch.dtype = model.dtype
        self.model, self.floor = model, _FLOOR[dtype]
        self.by_length = frequency_switch(model.config) is not None
        self.wider: Any = copy.deepcopy(model)
        if not experts:  # torch multiplies none in float64
            self.wider.to(_WIDER[dtype])

    def logits(self, program: Program, row: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted logits [T, V] in the wider type, and how far they may be missed."""
        want = plain_logits(self.wider, program, row)
        lost = (plain_logits(self.model, program, row).to(want) - want).abs().max()
        return want, self.floor * want.abs().max() + _TIMES * lost

    def of_logits(self, program: Program, row: Tensor, got: Tensor) -> float:
        want, allowed = self.logits(program, row)
        return float(((got.to(want) - want).abs().max() / allowed).nan_to_num(torch.inf))

    def of_tokens(self, program: Program, row: Tensor, new: list[int]) -> float:
        """Each greedy token has to be the likeliest, or within what is allowed of it twice."""
        whole = torch.cat((row, torch.tensor(new)))
        if self.by_length and len(new) > 1:  # each token was chosen at the length it had then
            parts = [whole[: len(row) + n] for n in range(len(new))]
            return max(self.of_tokens(program, p, [t]) for p, t in zip(parts, new, strict=True))
        want, allowed = self.logits(program, whole[:-1])
        ahead = want[len(row) - 1 :]
        short = ahead.amax(-1) - ahead.gather(-1, torch.tensor(new)[:, None])[:, 0]
        return float((short.max() / (2 * allowed)).nan_to_num(torch.inf))


def call(compiled: CompiledModel, judge: Judge, rng: random.Random, most: int) -> dict[str, Any]:
    """One random call, and how it was judged."""
    new = rng.randint(1, 8)
    count = rng.choice((1, 2, 3, 4))
    lengths = [rng.randint(1, most - new) for _ in range(count)]
    rows = [torch.tensor([rng.randrange(3, 100) for _ in range(n)]) for n in lengths]
    mixed = rng.random() < 0.4
    programs = [random_program(rng, compiled.depth) for _ in range(count if mixed else 1)]
    given: Any = programs if mixed else programs[0]
    of_row = programs if mixed else programs * count
    ids, mask = padded_rows([r.tolist() for r in rows], side=rng.choice(("left", "right")))
    kind = rng.choice(("forward", "generate", "generate"))
    if kind == "forward":
        got = compiled.forward(ids, mask, program=given)
        found = [g[m.bool()] for g, m in zip(got, mask, strict=True)]
        worst = max(map(judge.of_logits, of_row, rows, found))
    else:
        options: dict[str, Any] = dict(max_new_tokens=new, do_sample=False, eos_token_id=None)
        out = compiled.generate(ids, program=given, attention_mask=mask, pad_token_id=0, **options)
        worst = max(map(judge.of_tokens, of_row, rows, out[:, ids.shape[1] :].tolist()))
    texts = [str(p) for p in programs]
    return {"kind": kind, "lengths": lengths, "new": new, "programs": texts, "worst": worst}


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
        compiled = polar_fx.compile(
            model,
            case.backend,
            max_length=case.max_length,
            prefill_chunk=case.prefill_chunk,
            deterministic=case.deterministic,
            cache=False,
            workers=1,
        )
        for _ in range(_CALLS[case.backend]):
            calls.append(call(compiled, judge, rng, case.max_length))
    except Exception:
        error = traceback.format_exc()
    return {
        "case": str(case),
        "seconds": time.perf_counter() - start,
        "calls": len(calls),
        "worst": max((c["worst"] for c in calls), default=0.0),
        "failed": [c for c in calls if not c["worst"] <= 1],
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
        print(f"{case}: {found[-1]['calls']} calls, worst {found[-1]['worst']:.2f}", flush=True)
        if bad:
            print(f"  FAILED; again with: make fuzz SEED={case.seed} CASES=1\n  {bad}", flush=True)
    failed = [f for f in found if f["error"] or f["failed"]]
    calls = sum(f["calls"] for f in found)
    result = {"machine": machine(torch.device("cpu")), "cases": len(found), "calls": calls}
    write_json(arguments.out, {**result, "first_seed": arguments.seed, "failed": failed})
    print(f"{len(found)} cases, {calls} calls, {len(failed)} cases failed; {arguments.out}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
