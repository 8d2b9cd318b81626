"""Rows of different programs together: what that costs beside a uniform batch, with many columns
allowed, with requests that come and go, and in a second turn.

(a) decoding of mixed batches beside uniform ones of as many row-steps, the same rows in groups by
program, and one by one; (b) decoding at 200 tokens under several max_length; (c) 64 requests of
mixed programs, prompts and answers: the engine, batches by program that run to their longest row,
and HuggingFace's own generate in batches of the same size on the model's own program; (d) the
second turn of a chat. Medians of interleaved rounds, warm-up and compilation apart.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polar_fx
from measure import RESULTS, machine, paired_ratio, spread, write_json
from polar_fx import CompiledModel, Program
from polar_fx.engine import Sampling
from polar_fx.runtime.generator import padded_rows
from polar_fx.runtime.group_session import groups_of
from polar_fx.runtime.lockstep_order import lockstep_calls

_TOKENS = 64  # of a prompt in part (a)
_REQUESTS = 64


def _menu(depth: int, size: int, *, pick: random.Random) -> list[Program]:
    """Programs of one or two edits: skips of up to six layers, repeats of up to four."""
    found: list[Program] = []
    while len(found) < size:
        program = Program.identity(depth)
        for _ in range(pick.randint(1, 2)):
            start = pick.randrange(2, depth - 6)
            if pick.random() < 0.5:
                program = program.skip(min(start, program.num_steps - 7), pick.randint(1, 6))
            else:
                length = pick.randint(1, 4)
                program = program.repeat(min(start, program.num_steps - 5), length, 2)
        if program not in found:
            found.append(program)
    return found


def _of_steps(depth: int, steps: int) -> Program:
    """A program of so many steps."""
    identity = Program.identity(depth)
    if steps < depth:
        return identity.skip(4, depth - steps)
    return identity.repeat(4, steps - depth, 2) if steps > depth else identity


def _rounds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, in turns; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def mixed(model: CompiledModel, rounds: int) -> list[dict[str, Any]]:
    """Part (a)."""
    found, runner = [], model.runner
    pick = random.Random(0)
    for batch in (1, 8, 32):
        for size in (2, 5, 24):
            if size > batch > 1 and size == 24 and batch == 8:
                size = 8  # as many programs as rows
            if batch == 1 and size > 2:
                continue
            menu = _menu(model.depth, size, pick=pick)
            programs = [menu[i % size] for i in range(batch)]
            steps = sum(p.num_steps for p in programs)
            uniform = _of_steps(model.depth, round(steps / batch))
            found.append(
                {
                    "rows": batch,
                    "programs": len(set(programs)),
                    "row_steps": steps,
                    "calls": len(lockstep_calls(programs)),
                    "calls_by_depth": len(lockstep_calls(programs)) / model.depth,
                    "rows_a_call": steps / len(lockstep_calls(programs)),
                    **_decodes(runner, programs, uniform=uniform, rounds=rounds),
                }
            )
            print(found[-1], flush=True)
    return found


def _decodes(
    runner: Any, programs: Sequence[Program], *, uniform: Program, rounds: int
) -> dict[str, Any]:
    batch, steps = len(programs), sum(p.num_steps for p in programs)
    pick = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 1000, (_TOKENS,), generator=pick) for _ in programs]
    token = torch.zeros(batch, dtype=torch.long)
    with ExitStack() as stack:
        together = stack.enter_context(runner.open_rows(programs))
        same = stack.enter_context(runner.open_rows([uniform] * batch))
        groups = [
            (m, stack.enter_context(runner.open_slots(p, len(m))))
            for p, m in groups_of(programs).items()
        ]
        slots = stack.enter_context(runner.open_slots(uniform, batch))
        runner.prefill(together, rows)
        for session in (same, slots):
            runner.prefill(session, rows)
        for members, session in groups:
            runner.prefill(session, [rows[m] for m in members])
        times = _rounds(
            {
                "mixed": lambda: runner.decode(together, token),
                "uniform": lambda: runner.decode(same, token),
                "groups": lambda: [runner.decode(s, token[: len(m)]) for m, s in groups],
                "uniform_slots": lambda: runner.decode(slots, token),
            },
            rounds,
        )
        held = runner.lockstep.store
        tokens = sum(r.length * r.program.num_steps for s in (together, same) for r in s.rows.rows)
        memory = held.num_blocks * 16 / tokens
    per_step = steps / (uniform.num_steps * batch)
    by_uniform = [m / u / per_step for m, u in zip(times["mixed"], times["uniform"], strict=True)]
    return {
        **{f"{name}_ms": spread(own) for name, own in times.items()},
        "mixed_by_uniform": spread(by_uniform),
        "groups_by_mixed": paired_ratio(times["groups"], times["mixed"]),
        "kv_columns_by_tokens": memory,
    }


def lengths(
    model: CompiledModel, others: dict[int, CompiledModel], *, rounds: int
) -> dict[str, Any]:
    """Part (b)."""
    rows = [torch.arange(200) + 5]
    token = torch.zeros(1, dtype=torch.long)
    with ExitStack() as stack:
        ways: dict[str, Callable[[], Any]] = {}
        for most, each in others.items():
            session = stack.enter_context(each.runner.open(each.default_program, 1))
            slots = stack.enter_context(each.runner.open_slots(each.default_program, 1))
            for name, own in ((f"blocks {most}", session), (f"slots {most}", slots)):
                each.runner.prefill(own, rows)
                ways[name] = lambda r=each.runner, s=own: r.decode(s, token)
        times = _rounds(ways, min(rounds, 50))
    first = f"blocks {min(others)}"
    return {
        name: {"ms": spread(own), "ratio": paired_ratio(own, times[first])}
        for name, own in times.items()
    }


def arrivals(model: CompiledModel, hf: Any, *, rounds: int) -> dict[str, Any]:
    """Part (c): all requests are there at once; seconds until the first token of each."""
    pick = random.Random(3)
    menu = [*_menu(model.depth, 4, pick=pick), model.default_program]
    asked: list[tuple[list[int], Program, int]] = []
    for i in range(_REQUESTS):
        prompt = [pick.randrange(1000) for _ in range(pick.randint(8, 96))]
        asked.append((prompt, menu[i % len(menu)], pick.randint(4, 48)))
    ways = {
        "engine": lambda: _by_engine(model, asked),
        "batches by program": lambda: _by_batches(model, asked),
        "HF generate, identity": lambda: _by_hf(hf, asked),
    }
    seen: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            result = work()
            if number:
                seen[name].append(result)
                print(name, round(result[0], 2), flush=True)
    new = sum(count for *_, count in asked)
    found = {}
    for name, results in seen.items():
        first = sorted(t for _, times in results for t in times)
        seconds = [total for total, _ in results]
        found[name] = {
            "seconds": spread(seconds),
            "tokens_a_second": new / statistics.median(seconds),
            "first_token_p50_s": first[len(first) // 2],
            "first_token_p99_s": first[int(len(first) * 0.99)],
        }
    return {"requests": _REQUESTS, "new_tokens": new, "programs": len(menu), **found}


Asked = Sequence[tuple[list[int], Program, int]]


def _by_engine(model: CompiledModel, asked: Asked) -> tuple[float, list[float]]:
    engine = model.engine(max_rows=16)
    start = time.perf_counter()
    requests = [
        engine.add(prompt, program, Sampling(max_new_tokens=new)) for prompt, program, new in asked
    ]
    first: dict[int, float] = {}
    more = True
    while more:
        more = engine.step()
        now = time.perf_counter() - start
        for request in requests:
            if request.tokens and request.number not in first:
                first[request.number] = now
    return time.perf_counter() - start, list(first.values())


class _First:
    """A streamer-like criterion that notes when a batch had its first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)


def _in_batches(
    asked: Asked, groups: Sequence[Sequence[int]], *, generate: Callable[..., Any]
) -> tuple[float, list[float]]:
    start, first = time.perf_counter(), []
    for members in groups:
        ids, mask = padded_rows([asked[m][0] for m in members])
        watch = _First()
        generate(
            asked[members[0]][1],
            ids,
            attention_mask=mask,
            max_new_tokens=max(asked[m][2] for m in members),
            stopping_criteria=[watch],
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert watch.at is not None
        first += [watch.at - start] * len(members)
    return time.perf_counter() - start, first


def _by_batches(model: CompiledModel, asked: Asked) -> tuple[float, list[float]]:
    groups = []
    for members in groups_of([program for _, program, _ in asked]).values():
        groups += [members[i : i + 16] for i in range(0, len(members), 16)]
    return _in_batches(
        asked,
        groups,
        generate=lambda program, ids, **kw: model.generate(ids, program=program, **kw),
    )


def _by_hf(hf: Any, asked: Asked) -> tuple[float, list[float]]:
    groups = [range(i, min(i + 16, len(asked))) for i in range(0, len(asked), 16)]
    return _in_batches(asked, groups, generate=lambda _, ids, **kw: hf.generate(ids, **kw))


def second_turn(model: CompiledModel, rounds: int) -> dict[str, Any]:
    """Part (d): 400 tokens were said, 16 are new."""
    said, new = torch.arange(400) + 3, torch.arange(16) + 900
    runner = model.runner
    with model.start() as talk:
        talk.append(said)

        def reuse() -> None:
            talk.append(new)

        def back() -> None:
            talk.crop(400)

        def alone() -> None:
            with runner.open(model.default_program, 1) as session:
                runner.prefill(session, [new])

        def whole() -> None:
            with runner.open(model.default_program, 1) as session:
                runner.prefill(session, [torch.cat((said, new))])

        times = _rounds(
            {"second turn": reuse, "crop": back, "new tokens alone": alone, "whole text": whole},
            rounds,
        )
    return {
        name: {"ms": spread(own), "ratio": paired_ratio(own, times["new tokens alone"])}
        for name, own in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", default="abcd")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    hf, _ = polar_fx.load(None, getattr(torch, options.dtype))
    model = polar_fx.compile(hf, max_length=512)
    result: dict[str, Any] = {
        "machine": machine(model.device),
        "dtype": options.dtype,
        "model": model.runner.info.architecture,
    }
    if "a" in options.parts:
        result["mixed"] = mixed(model, options.rounds)
    if "b" in options.parts:
        others = {most: polar_fx.compile(hf, max_length=most) for most in (256, 8191)}
        result["lengths"] = lengths(model, others, rounds=options.rounds)
    if "c" in options.parts:
        result["arrivals"] = arrivals(model, hf, rounds=max(2, options.rounds // 8))
    if "d" in options.parts:
        result["second_turn"] = second_turn(model, options.rounds)
    write_json(options.out or RESULTS / f"engine-cpu-{options.dtype}.json", result)


if __name__ == "__main__":
    main()
