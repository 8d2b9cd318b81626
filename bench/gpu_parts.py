"""What the GPU benchmark measures of a model beside its speed: programs never seen, Table 4, mixed
batches, generation, kernels.

Each part takes the model's bench (gpu_models.ModelBench), whose linked model is compiled by then,
and writes one or more lines.
"""

import random
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from measure import timed
from polar_fx import Program
from polar_fx.backends import ShapeClass
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.runtime.runner import Session
from polar_fx.runtime.trunk import run_trunk, session_after

if TYPE_CHECKING:
    from gpu_models import ModelBench

_GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def graphs(bench: "ModelBench") -> None:
    """What a program that was never seen costs: linking, first decode, capture, memory."""
    compiled, worker, pick = bench.linked, bench.worker, random.Random(0)
    ids, link, first = bench.ids(1), [], []
    reserved = torch.cuda.memory_reserved() if worker.on_gpu else 0
    known = len(compiled.graphs.records) if compiled.graphs is not None else 0
    for _ in range(bench.num_programs):
        program = compiled.resolve(
            sorted(pick.sample(range(compiled.depth), compiled.depth - pick.randint(1, 4)))
        )
        shape = ShapeClass.of(1, 1, compiled.pool.length)
        link.append(timed(lambda p=program, s=shape: compiled.linker.link(p, s), worker.device))
        with compiled.session(program, 1) as session:
            compiled.prefill(program, session, [ids[0]])
            first.append(
                timed(lambda p=program, s=session: compiled.decode(p, s, ids[:, 0]), worker.device)
            )
    records = list(compiled.graphs.records)[known:] if compiled.graphs is not None else []
    failed = [r.reason for r in records if r.reason]
    worker.say(
        "graphs",
        model=bench.name,
        programs=len(first),
        link_ms=round(statistics.median(link), 3),
        first_decode_ms=round(statistics.median(first), 2),
        slowest_ms=round(max(first), 2),
        capture_ms=[round(r.capture_ms, 2) for r in records],
        failed=failed[:3],
        mib=((torch.cuda.memory_reserved() if worker.on_gpu else 0) - reserved) >> 20,
    )


def _skips(bench: "ModelBench", kinds: int) -> list[Program]:
    """So many programs, each of which skips another layer."""
    first = 2 if bench.linked.depth > 9 else 0
    return [Program.identity(bench.linked.depth).skip(first + i, 1) for i in range(kinds)]


def compile_rows(bench: "ModelBench") -> None:
    """Compile what `rows` will run."""
    with bench.linked.runner.open_together(_skips(bench, 2)) as session:
        bench.linked.runner.prefill(session, [*bench.ids(2)])
        bench.linked.runner.decode(session, bench.ids(2)[:, 0])


def rows(bench: "ModelBench") -> None:
    """Eight rows: a token of rows that run 1, 2, 4 and 8 programs in lock-step, beside slots of one
    program; and what the first token of a new mix costs.
    """
    runner, worker = bench.linked.runner, bench.worker
    count = 4 if worker.tiny else 8
    ids = bench.ids(count)
    known = len(runner.graphs.records) if runner.graphs is not None else 0

    def timed_tokens(session: Session) -> tuple[float, float]:
        token = torch.stack(runner.prefill(session, [*ids])).argmax(-1)
        start = timed(lambda: runner.decode(session, token), worker.device)
        for _ in range(2):
            token = runner.decode(session, token).argmax(-1)

        def several() -> None:
            following = token
            for _ in range(bench.tokens):
                following = runner.decode(session, following).argmax(-1)

        ms_a_token = worker.milliseconds(several, 2)["ms"] / bench.tokens
        return round(ms_a_token, 4), round(start, 2)

    identity, ms, first = Program.identity(runner.depth), {}, {}
    with runner.open_slots(identity, count) as session:
        ms["slots"], _ = timed_tokens(session)
    for name, programs in (
        ("identity", [identity]),
        *((kinds, _skips(bench, kinds)) for kinds in (1, 2, 4, 8) if kinds <= count),
    ):
        if worker.left() < 3:
            break
        with runner.open_together([programs[i % len(programs)] for i in range(count)]) as session:
            ms[name], first[name] = timed_tokens(session)
    with runner.open_slots(identity, 1) as session:
        ids = bench.ids(1)
        ms["one row, slots"], _ = timed_tokens(session)
    with runner.open_together([identity]) as session:
        ms["one row, blocks"], _ = timed_tokens(session)
    records = list(runner.graphs.records)[known:] if runner.graphs is not None else []
    failed = [record.reason for record in records if record.reason]
    captures = [round(record.capture_ms, 2) for record in records]
    uniform = ms.get(1, float("nan"))
    times = {name: round(each / uniform, 3) for name, each in ms.items()}
    worker.say(
        "rows",
        model=bench.name,
        rows=count,
        ms=ms,
        first_ms=first,
        capture_ms=captures,
        failed=failed[:3],
        times_uniform=times,
    )


def table4(bench: "ModelBench") -> None:
    """Table 4 of the paper: a pass over a prompt by programs of 23.3 of 24 layers on average, and
    what routing it costs.

    Seven prompts in ten skip one layer and three skip none.
    """
    compiled, worker, rows = bench.linked, bench.worker, [bench.ids(1)[0]]
    depth, repeats = compiled.depth, 3 if worker.tiny else 15
    identity = Program.identity(depth)
    shorter = [identity.skip(i, 1) for i in range(4, min(depth, 11))]
    menu = Menu.of(shorter)
    network = SelectorNetwork(2 * compiled.config.hidden_size, len(menu))
    dispatcher = compiled.dispatch_by(
        Selector(menu, Features(4, 16), network=network, calibration=Calibration(0.0)),
        policy="accuracy",
    )

    def run(program: Program) -> None:
        with compiled.session(program, 1) as session:
            compiled.prefill(program, session, rows)

    def behind_trunk(program: Program) -> None:
        with (
            run_trunk(compiled.runner, rows, num_steps=4) as trunk,
            session_after(compiled.runner, [program], trunk=trunk) as session,
        ):
            compiled.prefill(program, session, rows)

    with run_trunk(compiled.runner, rows, num_steps=4) as trunk:
        hidden = [trunk.hidden[0].clone()]
    for program in (identity, *shorter):
        run(program)
    model: Any = bench.model
    base = worker.milliseconds(lambda: run(identity), repeats)
    skipped = statistics.fmean(
        worker.milliseconds(lambda p=program: run(p), repeats)["ms"] for program in shorter
    )
    routing = worker.milliseconds(lambda: dispatcher.decide(hidden), repeats)
    worker.say(
        "table4",
        model=bench.name,
        tokens=len(rows[0]),
        identity=base,
        one_skipped_ms=round(skipped, 4),
        identity_behind_trunk=worker.milliseconds(lambda: behind_trunk(identity), repeats),
        hf_eager=worker.milliseconds(
            lambda: model(rows[0][None], use_cache=False, logits_to_keep=1), repeats
        ),
        routing=routing,
        ratio=round(0.3 + 0.7 * skipped / base["ms"], 4),
        routing_share=round(routing["ms"] / base["ms"], 5),
    )
    compiled.dispatcher = None


class _InTurn:
    """A predictor that deals out the first `kinds` programs of its menu row by row, and costs
    nothing.
    """

    def __init__(self, menu: Menu) -> None:
        self.menu, self.kinds = menu, 1
        self.features, self.calibration = Features(1, 4), Calibration(0.0)

    @property
    def depth(self) -> int:
        return self.menu.depth

    def propose(self, hidden: list[Tensor]) -> list[Proposal]:
        chances = np.zeros((len(hidden), len(self.menu)))
        for row in range(len(hidden)):
            chances[row, 1 + row % self.kinds] = 1.0
        return [Proposal(self.menu.programs, self.menu.steps, each) for each in chances]


def mixed(bench: "ModelBench") -> None:
    """A batch whose rows run one program, or several: dispatched generation beside generation by
    the identity.
    """
    compiled, worker = bench.linked, bench.worker
    rows, tokens = (4, 4) if worker.tiny else (8, 32)
    menu = Menu.of(
        [
            Program.identity(compiled.depth).skip(i, 1)
            for i in range(2, 2 + min(8, compiled.depth - 2))
        ]
    )
    predictor = _InTurn(menu)
    dispatcher = compiled.dispatch_by(cast(Any, predictor), policy="accuracy")
    dispatcher.admit()
    ids, options = bench.ids(rows), {"max_new_tokens": tokens, **_GREEDY}

    def dispatched() -> None:
        compiled.dispatch(ids, **options)

    found = {}
    for kinds in (1, 2, 4, 8):
        predictor.kinds = min(kinds, rows, len(menu) - 1)
        dispatched()
        dispatched()
        found[predictor.kinds] = worker.milliseconds(dispatched, 3)["ms"]
        if worker.left() < 3:
            break
    compiled.dispatcher = None
    compiled.generate(ids, program="identity", **options)
    identity = worker.milliseconds(
        lambda: compiled.generate(ids, program="identity", **options), 3
    )["ms"]
    worker.say(
        "mixed",
        model=bench.name,
        rows=rows,
        new_tokens=tokens,
        ms_by_programs=found,
        identity_ms=identity,
        times_uniform={programs: round(ms / found[1], 3) for programs, ms in found.items()},
    )


def generate(bench: "ModelBench") -> None:
    """Milliseconds a token of whole greedy `generate` calls of one row, prompt included: ours and
    transformers'.
    """
    compiled, worker, ids, tokens = (
        bench.linked,
        bench.worker,
        bench.ids(1),
        4 if bench.worker.tiny else 64,
    )
    options, model = {"max_new_tokens": tokens, **_GREEDY}, cast(Any, bench.model)
    compiled.generate(ids, **options)
    ours = worker.milliseconds(lambda: compiled.generate(ids, **options), 3)["ms"]
    theirs = worker.milliseconds(lambda: model.generate(ids, **options), 2)["ms"]
    worker.say(
        "generate",
        model=bench.name,
        new_tokens=tokens,
        ours_ms=round(ours / tokens, 4),
        hf_ms=round(theirs / tokens, 4),
    )


def kernels(bench: "ModelBench") -> None:
    """The kernels of one token (on the CPU: the operators), by the way the model is run."""
    worker = bench.worker
    shown = ("linked+graph", "linked untuned+graph", "HF compile", "whole+graph")
    for way in [w for w in bench.ways if w.batch == 1 and w.label in shown]:
        if worker.left() < 4:
            return
        ids = bench.ids(1, way.length)
        token = way.contender.prefill(ids).argmax(-1, keepdim=True)
        for _ in range(2):
            way.contender.decode(token)
        worker.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if worker.on_gpu else [])]
        with profile(activities=activities) as seen:
            way.contender.decode(token)
            worker.synchronize()
        way.contender.finish()
        wanted = "CUDA" if worker.on_gpu else "CPU"
        times: dict[str, list[float]] = {}
        for event in seen.events() or ():
            if str(event.device_type).endswith(wanted):
                taken = event.device_time_total if worker.on_gpu else event.self_cpu_time_total
                times.setdefault(event.name[:90], []).append(taken)
        ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
        worker.say(
            "profile",
            model=bench.name,
            way=way.label,
            length=way.length,
            kernels=sum(map(len, times.values())),
            us=round(sum(map(sum, times.values())), 1),
            most=[[name, len(each), round(sum(each), 1)] for name, each in ranked[:14]],
        )


PARTS: dict[str, Callable[["ModelBench"], None]] = {
    "rows": rows,
    "graphs": graphs,
    "table4": table4,
    "mixed": mixed,
    "generate": generate,
    "profile": kernels,
}
