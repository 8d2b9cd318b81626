"""One model of the GPU benchmark: the ways to run it, prepared one after the other and then timed.

Shape legend: B batch, T tokens, L KV length, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import polar_fx
from contenders import Contender
from gpu_parts import PARTS, compile_rows
from gpu_shapes import SHAPES, config_of, parts_of
from gpu_ways import HfEager, HfReduceOverhead, Linked, Whole, slot_length
from gpu_worker import UNTUNED, Worker
from polar_fx import CompiledModel, Program
from polar_fx.backends import Backend, InductorBackend, get_backend
from polar_fx.library import LayerLibrary
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner


@dataclass
class Way:
    """A contender under its label, with the batch and the length it is run at."""

    label: str
    batch: int
    length: int
    contender: Contender


def decode_bytes(
    library: LayerLibrary, program: Program, *, columns: int, batch: int = 1, experts: float = 1.0
) -> tuple[int, int]:
    """Bytes one decoded token a row must read: weights of its steps and of the head; and the slots
    of `columns` columns.

    `experts` is the share of a layer's experts (its weights of three axes) that a token is sent to.
    """
    calls = (*(library.layers[layer] for layer in program.path), library.epilogue)
    weights = sum(
        int(w.numel() * w.element_size() * (experts if w.dim() == 3 else 1))
        for call in calls
        for w in call.weights
    )
    return weights, batch * columns * sum(
        spec.bytes_per_token() for spec in library.kv_specs(program)
    )


class ModelBench:
    """One model's worker: prepares the ways, the most telling first, waits for its turn and times
    them.
    """

    def __init__(self, worker: Worker, name: str, *, stages: Collection[str]) -> None:
        self.worker, self.name = worker, name
        self.parts = [part for part in parts_of(name, worker.tiny) if part in stages]
        self.tokens, self.num_programs = (3, 3) if worker.tiny else (30, 16)
        # of rows; a slot has one column more
        self.lengths = (47, 95) if worker.tiny else (271, 4111)
        # a long slot is nearly filled, since dynamic caches are only as long as what they hold
        self.prompts: dict[int, int] = dict(
            zip(self.lengths, (12, 60) if worker.tiny else (128, 3840), strict=True)
        )
        self.ways: list[Way] = []
        self._first_logits: dict[tuple[int, int], Tensor] = {}
        start = time.perf_counter()
        config = AutoConfig.for_model(SHAPES[name].family, **config_of(name, worker.tiny))
        torch.manual_seed(0)
        with torch.device(worker.device):
            dtype = torch.bfloat16 if worker.on_gpu else torch.float32
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype
            ).eval()
        self.model.requires_grad_(False)
        worker.synchronize()
        self.gib = sum(p.nbytes for p in self.model.parameters()) / 2**30
        made = round(time.perf_counter() - start, 1)
        worker.say(
            "model",
            model=name,
            gib=round(self.gib, 2),
            dtype=str(self.model.dtype)[6:],
            seconds=made,
        )
        start = time.perf_counter()
        first = polar_fx.compile(
            self.model, "eager", max_length=self.lengths[0], cache=False, workers=0
        )
        self.library, self.identity = first.library, first.default_program
        self.prefill_chunk = first.prefill_chunk
        kinds = sorted(self.library.bodies)
        worker.say(
            "capture", model=name, kinds=kinds, seconds=round(time.perf_counter() - start, 1)
        )
        # A trial run interprets all ways: it is to show that the benchmark works, not to wait for a
        # compiler.
        self.linked = self.compiled("eager" if worker.tiny else "inductor", self.lengths[0])

    # ---------------------------------------------------------------------------------- preparation

    def ids(self, batch: int, length: int | None = None) -> Tensor:
        """Random prompts i64[B, T] for rows of `length` tokens."""
        tokens = self.prompts[length or self.lengths[0]]
        return torch.randint(
            0, 150, (batch, tokens), generator=torch.Generator().manual_seed(batch)
        ).to(self.worker.device)

    def compiled(
        self, backend: str | Backend, length: int, *, like: CompiledModel | None = None
    ) -> CompiledModel:
        """A compiled model on the library captured once; regions of several tokens are those of
        `like`.
        """
        regions = RegionTable(
            self.library, get_backend(backend), max_length=length, store=None, workers=0
        )
        made = CompiledModel(Runner.of_model(self.model, regions, prefill_chunk=self.prefill_chunk))
        if like is not None:
            several = {
                name: region
                for name, region in like.regions._regions.items()
                if name.shape.tokens is None
            }
            made.regions._regions.update(several)
        return made

    def add(
        self,
        label: str,
        make: Callable[[], Contender],
        *,
        seconds: float,
        batch: int = 1,
        length: int | None = None,
    ) -> None:
        """Make a way and run it for a few tokens: compile, capture.

        It is left out if fewer than `seconds` are left for that.
        """
        worker, length = self.worker, length or self.lengths[0]
        about = {"model": self.name, "way": label, "batch": batch, "length": length}
        if worker.left() < (2 if worker.tiny else seconds):
            worker.say("left-out", **about, left_s=round(worker.left()))
            return
        with worker.attempt("first", **about), torch.no_grad():
            start = time.perf_counter()
            way = Way(label, batch, length, make())
            ids = self.ids(batch, length)
            logits = way.contender.prefill(ids)
            worker.synchronize()
            filled = time.perf_counter()
            # the same tokens for all: random weights soon lead apart what differs by rounding
            for i in range(3):
                logits = way.contender.decode(ids[:, i : i + 1])
            worker.synchronize()
            taken = time.perf_counter() - filled
            if not torch.isfinite(logits).all():
                raise ValueError("logits are not finite")
            want = self._first_logits.setdefault((batch, length), logits.float().clone())
            apart = float((logits - want).abs().max() / want.abs().max())
            way.contender.finish()
            self.ways.append(way)
            worker.say(
                "first",
                **about,
                prefill_s=round(filled - start, 1),
                decode_s=round(taken, 1),
                to_the_first_way=apart,
            )

    def prepare(self) -> None:
        """Make all ways. `seconds` are what each took to prepare on 16 cores beside the others."""
        self.add("linked+graph", lambda: Linked(self.linked, self.identity), seconds=20)
        if "rows" in self.parts:
            start = time.perf_counter()
            with self.worker.attempt("rows", model=self.name), torch.no_grad():
                compile_rows(self)
            seconds = round(time.perf_counter() - start, 1)
            self.worker.say("first", model=self.name, way="rows", seconds=seconds)
        if "speed" in self.parts:
            self._prepare_speed()

    def _prepare_speed(self) -> None:
        (short, long), tiny, linked = self.lengths, self.worker.tiny, self.linked
        model, identity, untuned = (
            self.model,
            self.identity,
            linked.backend if tiny else InductorBackend(UNTUNED),
        )
        self.add("HF eager", lambda: HfEager(model), seconds=5)
        self.add("linked", lambda: Linked(linked, identity, graph=False), seconds=5)
        self.add(
            "HF compile",
            lambda: HfReduceOverhead(model, 1, max_length=short, interpreted=tiny),
            seconds=35,
        )
        self.add(
            "whole+graph",
            lambda: Whole(self.worker, linked, program=identity, interpreted=tiny),
            seconds=40,
        )
        far = self.compiled(linked.backend, long)
        self.add("linked+graph", lambda: Linked(far, identity), seconds=15, length=long)
        self.add("HF eager", lambda: HfEager(model), seconds=5, length=long)
        self.add("linked+graph", lambda: Linked(linked, identity), seconds=15, batch=8)
        self.add("HF eager", lambda: HfEager(model), seconds=5, batch=8)
        if not tiny:  # a trial has traced one
            self.add(
                "HF compile",
                lambda: HfReduceOverhead(model, 8, max_length=short),
                seconds=35,
                batch=8,
            )
            self.add(
                "HF compile",
                lambda: HfReduceOverhead(model, 1, max_length=long),
                seconds=35,
                length=long,
            )
        self.add(
            "linked untuned+graph",
            lambda: Linked(self.compiled(untuned, short, like=linked), identity),
            seconds=15,
        )

    # --------------------------------------------------------------------------------------- timing

    def measure(self) -> None:
        """Time all ways, then the model's other parts, as long as there is time."""
        worker = self.worker
        for way in self.ways if "speed" in self.parts else ():
            about = {"model": self.name, "way": way.label, "batch": way.batch, "length": way.length}
            if worker.left() < 2:
                worker.say("left-out", **about, left_s=round(worker.left()))
                continue
            with worker.attempt("speed", **about), torch.no_grad():
                worker.say("speed", **about, **self.speed(way))
        for part in self.parts:
            if part != "speed" and worker.left() < 3:
                worker.say("left-out", model=self.name, part=part, left_s=round(worker.left()))
            elif part != "speed":
                with worker.attempt(part, model=self.name), torch.no_grad():
                    PARTS[part](self)
        if worker.on_gpu:
            most = torch.cuda.max_memory_allocated() / 2**30
            worker.say("memory", model=self.name, gib=round(most, 2), weights=round(self.gib, 2))

    def speed(self, way: Way) -> dict[str, object]:
        """Milliseconds of a prompt and of a token, of the device alone and of the host; bytes a
        second.
        """
        worker, run, ids = self.worker, way.contender, self.ids(way.batch, way.length)
        prefill = worker.milliseconds(
            lambda: (run.prefill(ids), run.finish()), 2 if worker.tiny else 5
        )
        taken = []
        for _ in range(3):
            run.finish()
            token = run.prefill(ids).argmax(-1, keepdim=True)
            for _ in range(2):
                token = run.decode(token).argmax(-1, keepdim=True)
            worker.synchronize()
            start = time.perf_counter()
            for _ in range(self.tokens):
                token = run.decode(token).argmax(-1, keepdim=True)
            worker.synchronize()
            taken.append(1e3 * (time.perf_counter() - start) / self.tokens)
        ms = statistics.median(taken)
        graph = run.graph() if isinstance(run, Linked) else None
        # few enough replays that there would be room for their tokens, should a graph count them
        alone = (
            None if graph is None else worker.replay_ms(graph, 3, inner=5 if worker.tiny else 20)
        )
        run.finish()
        chosen, of = (
            getattr(self.model.config, name, None)
            for name in ("num_experts_per_tok", "num_experts")
        )
        share = chosen / of if chosen and of else 1.0
        weights, kv = decode_bytes(
            self.library,
            self.identity,
            columns=slot_length(way.length),
            batch=way.batch,
            experts=share,
        )
        return {
            "prefill_tokens": ids.shape[1],
            "prefill": prefill,
            "decode_ms": round(ms, 4),
            "decode_all": [round(t, 4) for t in taken],
            "device_ms": alone,
            "host_ms": None if alone is None else round(ms - alone, 4),
            "weight_mb": round(weights / 1e6, 2),
            "kv_mb": round(kv / 1e6, 2),
            "gbs": round((weights + kv) / ms / 1e6, 2),
        }


def run_model(worker: Worker, name: str, *, stages: Collection[str]) -> None:
    """The whole work of one model's worker."""
    bench = ModelBench(worker, name, stages=stages)
    with worker.attempt("prepare", model=name):
        bench.prepare()
    regions = [[r.body, r.shapes, round(r.seconds, 1)] for r in bench.linked.regions.records]
    worker.say("prepared", model=name, ways=len(bench.ways), regions=regions)
    worker.wait_for_turn()
    bench.measure()
    worker.finished()
