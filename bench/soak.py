"""The engine for long: random batches held against each row alone, and requests of which many are
cancelled or fail.

    PYTHONPATH=tests/support python bench/soak.py --batches 2000 --requests 10000

(a) Batches of 1 to 16 rows over tiny models of four families in float32: random programs, prompts
of different lengths (of Gemma 3 longer than its window), rows that join and leave at random. The
tokens of each row must be the likeliest of a plain loop over the model's own layers, which sees one
row at a time, and its scores within 1e-4 of that; a part of the batches runs in deterministic mode
and must have the same bits as each row alone. (b) Requests with cancels, processors that
raise and scores that are not finite: the others get the tokens of the plain loop, and in the end
everything that was held is free. Goes on where it was interrupted (`--out`).
"""

import argparse
import functools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polar_fx
from engines import FAMILIES
from fuzz_calls import random_program
from measure import RESULTS, machine, write_json
from plain_loop import plain_logits
from polar_fx import CompiledModel
from polar_fx.engine import Engine, Request, Sampling
from tiny_models import make

_TOLERANCE = 1e-4
_LENGTH = 160
_SAME_BITS = 8  # one batch in so many runs in deterministic mode


@functools.cache
def _compiled(family: str, deterministic: bool) -> CompiledModel:
    model = make(family)
    return polar_fx.compile(
        model, "eager", max_length=_LENGTH, cache=False, deterministic=deterministic
    )


class Scores:
    """A processor that keeps the scores of a request."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores[0].clone())
        return scores


def _prompt(pick: random.Random, longest: int) -> list[int]:
    return [pick.randrange(1, 90) for _ in range(pick.randint(1, longest))]


def _plain(family: str, request: Request) -> Tensor:
    """Scores [new, V] of the plain loop, for a request's prompt and the tokens that it got."""
    tokens, program = request.result(0).tokens, request.program
    assert program is not None
    row = torch.tensor([*request.prompt, *tokens[:-1]])
    return plain_logits(make(family), program, row=row)[-len(tokens) :]


@dataclass
class Batches:
    """What came of the batches so far."""

    done: int = 0
    rows: int = 0
    tokens: int = 0
    same_bits: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)


def run_batch(seed: int, found: Batches) -> None:
    """One batch, judged."""
    pick = random.Random(seed)
    family, exact = FAMILIES[seed % len(FAMILIES)], pick.randrange(_SAME_BITS) == 0
    model = _compiled(family, exact)
    part = pick.choice((3, 16, 64, 256))
    engine = model.engine(
        max_rows=pick.randint(1, 16),
        prefill_tokens=part,
        kept_bytes=pick.choice((0, 1 << 14, 1 << 20)),
    )
    requests, watched = [], []
    shared = _prompt(pick, 60)
    for _ in range(pick.randint(1, 16)):
        prompt = _prompt(pick, 60)
        if pick.random() < 0.3:
            prompt = shared[: pick.randint(1, len(shared))] + prompt[:20]
        watched.append(Scores())
        how = Sampling(max_new_tokens=pick.randint(1, 24), processors=(watched[-1],))
        requests.append(engine.add(prompt, random_program(pick, model.depth), how))
        for _ in range(pick.choice((0, 0, 1, 5))):
            engine.step()
    while engine.step():
        pass
    engine.close()
    if exact:
        wrong_bits = _other_bits(model, requests, watched=watched, part=part)
        found.wrong += [f"seed {seed}, {family}: {wrong}" for wrong in wrong_bits]
    for number, (request, scores) in enumerate(zip(requests, watched, strict=True)):
        own = torch.stack(scores.seen)
        wrong = _judge(request, own, family=family, found=found)
        if wrong:
            found.wrong.append(f"seed {seed}, {family}, row {number}, {request.program}: {wrong}")
    if blocks := model.runner.lockstep.store.num_blocks:
        found.wrong.append(f"seed {seed}, {family}: {blocks} blocks are still held")
    found.done += 1
    found.rows += len(requests)
    found.same_bits += exact


def _other_bits(
    model: CompiledModel, requests: Sequence[Request], *, watched: Sequence[Scores], part: int
) -> list[str]:
    """Rows whose scores have other bits than those of a row in an engine of its own, whose prompts
    are cut in the same places.
    """
    wrong = []
    for request, scores in zip(requests, watched, strict=True):
        engine, own = model.engine(prefill_tokens=part), Scores()
        how = Sampling(max_new_tokens=len(scores.seen), processors=(own,))
        engine.add(request.prompt, request.program, how)
        while engine.step():
            pass
        engine.close()
        if not torch.equal(torch.stack(own.seen), torch.stack(scores.seen)):
            wrong.append(f"{request.program} has other bits than alone")
    return wrong


def _judge(request: Request, own: Tensor, *, family: str, found: Batches) -> str | None:
    """What is wrong with the scores [new, V] of a request."""
    tokens, wanted = list(request.result(0).tokens), _plain(family, request)
    found.tokens += len(tokens)
    if wanted.argmax(-1).tolist() != tokens:
        return f"tokens {tokens}, by the plain loop {wanted.argmax(-1).tolist()}"
    found.worst = max(found.worst, worst := float((wanted - own).abs().max()))
    return None if worst <= _TOLERANCE else f"scores differ by {worst:.1e}"


@dataclass
class Requests:
    """What came of the requests so far."""

    done: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    blocks_left: int = 0
    bytes_at_first: int = 0
    bytes_at_last: int = 0
    wrong: list[str] = field(default_factory=list)


class _Fails:
    """A processor that raises, or spoils the scores, at a token of its own."""

    def __init__(self, at: int, raises: bool) -> None:
        self.at, self.raises = at, raises

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        self.at -= 1
        if self.at >= 0:
            return scores
        if self.raises:
            raise ZeroDivisionError("a processor's own error")
        return scores * float("nan")


def run_requests(seed: int, count: int, *, found: Requests) -> None:
    """So many requests of one engine, some of which are cancelled at any moment or fail."""
    pick = random.Random(f"requests {seed}")
    family = FAMILIES[seed % len(FAMILIES)]
    model = _compiled(family, False)
    engine = model.engine(max_rows=pick.randint(2, 16), kept_bytes=pick.choice((0, 1 << 18)))
    requests, fates = [], []
    for _ in range(count):
        fate = pick.choice(("finishes", "finishes", "cancelled", "raises", "not finite"))
        fails = _Fails(pick.randint(0, 6), fate == "raises")
        how = Sampling(
            max_new_tokens=pick.randint(1, 10),
            processors=(fails,) if fate in ("raises", "not finite") else (),
        )
        requests.append(engine.add(_prompt(pick, 40), random_program(pick, model.depth), how))
        fates.append(fate)
        _go_on(engine, pick, latest=list(zip(requests, fates, strict=True))[-20:])
    while engine.step():
        pass
    for number, (request, fate) in enumerate(zip(requests, fates, strict=True)):
        wrong = _judge_fate(request, family=family, fate=fate, found=found, looks=number % 10 == 0)
        if wrong:
            found.wrong.append(f"seed {seed}, {family}, request {number}: {wrong}")
    engine.close()
    store = model.runner.lockstep.store
    found.blocks_left += store.num_blocks
    found.bytes_at_last = sum(
        _compiled(each, False).runner.lockstep.store.num_bytes for each in FAMILIES
    )
    if found.done < len(FAMILIES) * count:
        found.bytes_at_first = found.bytes_at_last
    found.done += count


def _go_on(engine: Engine, pick: random.Random, *, latest: list[tuple[Request, str]]) -> None:
    """Some steps, after which one request may be cancelled."""
    for _ in range(pick.choice((0, 1, 2, 4))):
        engine.step()
    waiting = [request for request, fate in latest if fate == "cancelled"]
    if waiting and pick.random() < 0.5:
        pick.choice(waiting).cancel()


def _judge_fate(
    request: Request, *, family: str, fate: str, found: Requests, looks: bool
) -> str | None:
    """What is wrong with how a request ended; `looks` holds its tokens against the plain loop."""
    if not request.is_done:
        return "it never ended"
    try:
        tokens = list(request.result(0).tokens)
    except Exception as error:
        found.failed += 1
        return None if fate in ("raises", "not finite") else f"{type(error).__name__}: {error}"
    if request.result(0).finish == "cancelled":
        found.cancelled += 1
        return None if fate == "cancelled" else "it was cancelled by nobody"
    found.finished += 1
    if looks and request.program is not None:
        wanted = _plain(family, request).argmax(-1).tolist()
        if wanted != tokens:
            return f"tokens {tokens}, by the plain loop {wanted}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tiny models
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    batches, requests = Batches(**known.get("batches", {})), Requests(**known.get("requests", {}))
    start, written = time.perf_counter(), time.perf_counter()

    def write() -> None:
        seconds = known.get("seconds", 0.0) + time.perf_counter() - start
        result = {"machine": machine(torch.device("cpu")), "seconds": seconds}
        write_json(options.out, result | {"batches": asdict(batches), "requests": asdict(requests)})

    while batches.done < options.batches or requests.done < options.requests:
        if batches.done < options.batches:
            run_batch(batches.done, batches)
        if requests.done < options.requests:
            run_requests(requests.done // 10, 10, found=requests)
        if time.perf_counter() - written > 20:
            written = time.perf_counter()
            write()
            print(
                f"{batches.done} batches, {requests.done} requests, "
                f"{len(batches.wrong) + len(requests.wrong)} wrong",
                flush=True,
            )
    write()
    for line in batches.wrong + requests.wrong:
        print(line)
    raise SystemExit(bool(batches.wrong or requests.wrong or requests.blocks_left))


if __name__ == "__main__":
    main()
