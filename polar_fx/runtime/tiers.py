"""Tier 1: a whole program compiled as one graph, where that is measured to be faster than linked
regions (tier 0).

`tier="auto"` counts calls. A hot program is compiled in a worker process while requests go on; then
real calls alternate between the two forms and are timed, and the faster one stays. Both write the
same KV slots, so a request may change over at any token.

Shape legend: B batch (1), T tokens, V vocabulary.
"""

import logging
import queue
import random
import statistics
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..backends.base import PersistentBackend, Region, ShapeClass
from ..backends.whole import WholePlan, WholeStep
from ..backends.worker import Worker, describe
from ..errors import InputError
from ..library import LayerLibrary
from ..library.symbols import Symbol
from ..program import Program
from .code_key import VariantCache, VariantKey
from .link import LinkedProgram, StepInputs, region_calls
from .regions import KEEP_KV_WRITES, RegionTable

log = logging.getLogger("polar_fx.tiers")

Tier = Literal["linked", "whole", "auto"]
TIERS: tuple[Tier, ...] = ("linked", "whole", "auto")

_MAX_REMEMBERED = 4096


@dataclass(frozen=True)
class TierPolicy:
    """When a program is worth a compilation, and when its whole form is worth keeping.

    `hot_calls` calls of one phase start a compilation, `trial_calls` timed calls of each form
    decide, and the whole form must be at least `margin` faster by its median. `memory_bytes` bounds
    the loaded whole programs. Raises InputError.
    """

    hot_calls: int = 100
    trial_calls: int = 20
    margin: float = 0.02
    memory_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        for name in ("hot_calls", "trial_calls", "memory_bytes"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} of a tier policy must be at least 1, got {getattr(self, name)}"
                )


@dataclass
class TierRecord:
    """What became of one program and phase.

    `state`: "cold", "compiling", "trial", "whole" (kept) or "linked" (dropped, `reason` says why).
    Times are seconds to compile or load, and median milliseconds a call (prefill: a token) of
    either form during the trial.
    """

    program: Program
    phase: Literal["prefill", "decode"]
    state: str = "cold"
    calls: int = 0
    compile_s: float = 0.0
    num_bytes: int = 0
    linked_ms: float | None = None
    whole_ms: float | None = None
    reason: str = ""


@dataclass
class _Variant:
    record: TierRecord
    key: VariantKey
    shape: ShapeClass
    weights: list[Tensor]
    linked: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


class Tiers:
    """Chooses between a program's linked and whole form, one row at a time (larger batches are
    always linked).
    """

    def __init__(
        self,
        library: LayerLibrary,
        regions: RegionTable,
        *,
        kv_index: Tensor,
        tier: Tier,
        policy: TierPolicy,
    ) -> None:
        if tier not in TIERS:
            raise InputError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
        self.library, self.regions, self.kv_index = library, regions, kv_index
        self.tier, self.policy = tier, policy
        self._variants: dict[tuple[Program, bool], _Variant] = {}
        self._cache = VariantCache(policy.memory_bytes)
        self._lock = threading.Lock()
        self._chance = random.Random(0)
        self._background: _Background | None = None
        self._job = describe(regions.backend)
        if tier != "linked":
            library.require_no_states(f"tier={tier!r}")
            library.require_own_kv(f"tier={tier!r}")
        # not on a GPU: whole programs are in no CUDA graph yet, without which they lose more than
        # they gain (docs/gpu.md)
        if tier != "linked" and (
            self._job is None or regions.store is None or library.device.type != "cpu"
        ):
            raise InputError(
                f"tier={tier!r} needs the CPU, the artifact store and a backend that compiles to "
                "files; compile with backend='aot_inductor', its own passes and cache=True, or "
                "with tier='linked'"
            )

    @property
    def records(self) -> tuple[TierRecord, ...]:
        """Every program and phase that is kept in mind."""
        with self._lock:
            return tuple(v.record for v in self._variants.values())

    def run(
        self,
        linked: LinkedProgram,
        shape: ShapeClass,
        *,
        inputs: StepInputs,
        run_linked: Callable[[LinkedProgram, StepInputs], Tensor],
    ) -> Tensor:
        """Logits [1, 1, V] of one row by the form that is due, the linked one by `run_linked`.

        With tier="whole" it compiles what is missing, and raises CompileError or CacheError if that
        fails. Raises ProgramError for the inputs of another program.
        """
        linked.check(inputs)
        if self.tier == "linked":
            return run_linked(linked, inputs)
        variant = self._variant(linked.program, shape)
        record = variant.record
        record.calls += 1
        region = self._due(variant)
        if region is None:
            return run_linked(linked, inputs)
        operands = self._operands(variant, inputs)
        if record.state != "trial":
            return region(operands)[0]
        # by chance, not in turns: requests may have a rhythm of their own
        takes_whole = self._chance.random() < 0.5
        times = variant.whole if takes_whole else variant.linked
        start = time.perf_counter()
        logits = region(operands)[0] if takes_whole else run_linked(linked, inputs)
        times.append((time.perf_counter() - start) / inputs.ids.shape[1])
        if min(len(variant.linked), len(variant.whole)) >= self.policy.trial_calls:
            self._decide(variant)
        return logits

    def _operands(self, variant: _Variant, inputs: StepInputs) -> list[Tensor]:
        """What the whole form takes; backends/whole.py has the order."""
        where = [] if inputs.logits_at is None else [inputs.logits_at]
        slots = [t for pair in inputs.slots for t in pair]
        return [inputs.ids, inputs.positions, self.kv_index, *where, *slots, *variant.weights]

    def key(self, program: Program, shape: ShapeClass) -> VariantKey:
        """The key under which the store keeps a whole program."""
        library, backend = self.library, self.regions.backend
        passes = () if shape.tokens == 1 else (KEEP_KV_WRITES.content_id,)
        return VariantKey.of(
            "whole",
            library.fingerprint,
            shape=shape,
            backend=backend,
            device=library.device,
            dtype=library.dtype,
            program=str(program),
            passes=passes,
        )

    def wait(self) -> None:
        """Until no compilation is under way or queued."""
        if self._background is not None:
            self._background.jobs.join()

    # ---------------------------------------------------------------------------------- compilation

    def _due(self, variant: _Variant) -> Region | None:
        """The whole form, if it is to be used; with tier="auto" nothing is compiled or loaded
        here.
        """
        record = variant.record
        if self.tier == "whole":
            return self._cache.get(variant.key) or self._make(variant, "whole")
        if record.state in ("trial", "whole"):
            if (region := self._cache.get(variant.key)) is not None:
                return region
            record.state = "cold"  # pushed out of memory: in the background once more
        if record.state == "cold" and record.calls >= self.policy.hot_calls:
            with self._lock:
                if record.state == "cold":
                    record.state = "compiling"
                    self._background = self._background or _Background(self)
                    self._background.jobs.put(variant)
        return None

    def _variant(self, program: Program, shape: ShapeClass) -> _Variant:
        place = (program, shape.tokens != 1)
        if (found := self._variants.get(place)) is None:
            record = TierRecord(program, "decode" if shape.tokens == 1 else "prefill")
            weights = [self.library.tensors[name] for name in self._names(program)]
            made = _Variant(record, self.key(program, shape), shape, weights)
            with self._lock:
                found = self._variants.setdefault(place, made)
                cold = [p for p, v in self._variants.items() if v.record.state == "cold"]
                # a search runs millions of programs once
                for old in cold[: len(self._variants) - _MAX_REMEMBERED]:
                    del self._variants[old]
        return found

    def _names(self, program: Program) -> dict[str, int]:
        """The distinct weights of a program by name, numbered."""
        table = self.library.table
        calls = (table.prologue, *(table.layers[layer] for layer in program.path), table.epilogue)
        names = dict.fromkeys(name for call in calls for name in call.weights)
        return {name: i for i, name in enumerate(names)}

    def _plan(self, program: Program, shape: ShapeClass) -> WholePlan:
        table, numbers = self.library.table, self._names(program)

        def step(symbol: Symbol, opens: int = 0, *, closes: tuple[float, ...] = ()) -> WholeStep:
            weights = tuple(numbers[n] for n in symbol.weights)
            return WholeStep(symbol.target, symbol.sides, weights, opens, closes)

        steps = tuple(
            step(table.layers[s.layer], s.opens, closes=s.closes) for s in program.schedule()
        )
        calls = region_calls(table, program, shape=shape, every=shape.tokens == 1)
        names = list(dict.fromkeys(calls))
        paths = map(str, self.regions.graph_files(names))
        bodies = dict(zip(names, paths, strict=True))
        ends = step(table.prologue), step(table.epilogue)
        return WholePlan(shape, bodies, len(numbers), ends[0], steps, ends[1])

    def _make(self, variant: _Variant, state: str, *, worker: Worker | None = None) -> Region:
        """Compile, or load, the whole form; the record is in `state` afterwards, or as it was if
        that fails.
        """
        record, store, backend, before = (
            variant.record,
            self.regions.store,
            self.regions.backend,
            variant.record.state,
        )
        assert (
            store is not None and self._job is not None and isinstance(backend, PersistentBackend)
        )
        start = time.perf_counter()
        own = worker or Worker()

        job, threads = dict(self._job), variant.key.threads

        def make(folder: Path) -> None:
            plan = self._plan(record.program, variant.shape).to_dict()
            own.run({**job, "folder": str(folder), "threads": threads, "whole": plan})

        record.state = "compiling"
        try:
            files, _ = store.get_or_make(variant.key.digest, variant.key.facts(), make=make)
            region = backend.load(files)
            record.num_bytes = sum(p.stat().st_size for p in files.values())
        except BaseException:
            record.state = before
            raise
        finally:
            if worker is None:
                own.close()
        self._cache.put(variant.key, region, num_bytes=record.num_bytes)
        record.compile_s, record.state = time.perf_counter() - start, state
        log.info(
            "%s of %s is ready whole after %.1f s", record.phase, record.program, record.compile_s
        )
        return region

    def _promote(self, variant: _Variant, worker: Worker) -> None:
        """What the background does: from now on the whole form is tried, or used if it won
        before.
        """
        record = variant.record
        try:
            self._make(variant, "whole" if record.whole_ms is not None else "trial", worker=worker)
        except Exception as error:  # whatever it was, the linked form goes on
            record.state, record.reason = "linked", f"{type(error).__name__}: {error}"
            if self._background is not None and not self._background.stopping.is_set():
                log.warning(
                    "%s of %s stays linked: %s", record.phase, record.program, record.reason
                )

    def _decide(self, variant: _Variant) -> None:
        record = variant.record
        with self._lock:
            if record.state != "trial":
                return
            record.linked_ms, record.whole_ms = (
                1e3 * statistics.median(t) for t in (variant.linked, variant.whole)
            )
            faster = 1 - record.whole_ms / record.linked_ms
            record.state = "whole" if faster >= self.policy.margin else "linked"
            what = (
                f"whole is {100 * abs(faster):.1f} % {'faster' if faster >= 0 else 'slower'} "
                "than linked"
            )
            record.reason = (
                what
                if record.state == "whole"
                else f"{what}; kept only from {100 * self.policy.margin:.0f} % on"
            )
            if record.state == "linked":
                self._cache.drop(variant.key)
        log.info("%s of %s: %s", record.phase, record.program, record.reason)


class _Background:
    """A thread that promotes variants one by one on a worker of low priority.

    A daemon, so that a program that ends does not wait for it; it keeps no `Tiers` alive.
    """

    def __init__(self, tiers: Tiers) -> None:
        self.jobs: queue.Queue[_Variant] = queue.Queue()
        self.stopping = threading.Event()
        self.worker = Worker(nice=10)
        threading.Thread(
            target=self._serve, args=(weakref.ref(tiers),), name="polar_fx-tiers", daemon=True
        ).start()
        weakref.finalize(tiers, self._stop)

    def _serve(self, tiers: "weakref.ref[Tiers]") -> None:
        while not self.stopping.is_set():
            try:
                variant = self.jobs.get(timeout=1)
            except queue.Empty:
                continue
            owner = tiers()
            if owner is not None:
                owner._promote(variant, self.worker)
            del owner, variant
            self.jobs.task_done()

    def _stop(self) -> None:
        self.stopping.set()
        self.worker.close()
