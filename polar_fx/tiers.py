"""Tier 1: a whole program compiled as one graph, where that is measured to be faster than linked regions (tier 0).

`tier="auto"` counts calls. A hot program is compiled in a worker process while requests go on; then real calls alternate
between the two forms and are timed, and the faster one stays. Both write the same KV slots, so a request may change over
at any token.

Shape legend: B batch (1), T tokens, V vocabulary.
"""

import logging
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .backends.base import PersistentBackend, Region, ShapeClass
from .backends.whole import WholePlan, WholeStep
from .backends.worker import Worker, describe
from .errors import InputError, PolarError
from .library import LayerLibrary
from .program import Program
from .regions import KV_WRITES, RegionTable, Wanted
from .symbols import Symbol
from .variant import VariantCache, VariantKey

log = logging.getLogger("polar_fx.tiers")

Tier = Literal["linked", "whole", "auto"]
TIERS: tuple[Tier, ...] = ("linked", "whole", "auto")


@dataclass(frozen=True)
class TierPolicy:
    """When a program is worth a compilation, and when its whole form is worth keeping.

    `hot_calls` calls of one phase start a compilation, `trial_calls` timed calls of each form decide, and the whole form
    must be at least `margin` faster by its median. `memory_bytes` bounds the loaded whole programs.
    """

    hot_calls: int = 100
    trial_calls: int = 20
    margin: float = 0.02
    memory_bytes: int = 1 << 28


@dataclass
class TierRecord:
    """What became of one program and phase.

    `state`: "cold", "compiling", "trial", "whole" (kept) or "linked" (dropped, `reason` says why). Times are seconds to
    compile, and median milliseconds a call (prefill: a token) of either form during the trial.
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
    weights: list[Tensor]
    linked: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    coming: "Future[None] | None" = None


class Tiers:
    """Chooses between a program's linked and whole form, one row at a time (larger batches are always linked)."""

    def __init__(self, library: LayerLibrary, regions: RegionTable, kv_index: Tensor, tier: Tier, policy: TierPolicy) -> None:
        if tier not in TIERS:
            raise InputError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
        self.library, self.regions, self.kv_index = library, regions, kv_index
        self.tier, self.policy = tier, policy
        self._variants: dict[tuple[Program, bool], _Variant] = {}
        self._cache = VariantCache(policy.memory_bytes)
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._job = describe(regions.backend)
        if tier != "linked" and (self._job is None or regions.store is None):
            raise InputError(
                f"tier={tier!r} needs the artifact store and a backend that compiles to files; "
                "compile with backend='aot_inductor', its own passes and cache=True, or with tier='linked'"
            )

    @property
    def records(self) -> tuple[TierRecord, ...]:
        """Every program and phase seen so far."""
        return tuple(v.record for v in self._variants.values())

    def run(
        self, program: Program, shape: ShapeClass, input_ids: Tensor, positions: Tensor, where: Tensor | None,
        slots: Sequence[tuple[Tensor, Tensor]], linked: Callable[[], Tensor | None],
    ) -> Tensor | None:  # fmt: skip
        """Logits [1, 1, V] by the form that is due. `where` i64[1] names the token of a prefill, None decodes."""
        if self.tier == "linked":
            return linked()
        variant = self._variant(program, shape, where is not None)
        record = variant.record
        record.calls += 1
        if self.tier == "whole" and record.state == "cold":
            self._compile(variant, shape, keep=True)
        elif self.tier == "auto" and record.state == "cold" and record.calls >= self.policy.hot_calls:
            self._promote(variant, shape)
        trial = record.state == "trial"
        if record.state not in ("whole", "trial") or (trial and len(variant.whole) > len(variant.linked)):
            form = linked
        else:
            region = self._cache.get(variant.key) or self._load(variant, shape)

            def form() -> Tensor | None:
                inputs = [input_ids, positions, self.kv_index] + ([] if where is None else [where])
                return region([*inputs, *(t for pair in slots for t in pair), *variant.weights])[0]

        if not trial:
            return form()
        start = time.perf_counter()
        logits = form()
        seconds = (time.perf_counter() - start) / input_ids.shape[1]
        (variant.linked if form is linked else variant.whole).append(seconds)
        if len(variant.linked) >= self.policy.trial_calls:
            self._decide(variant)
        return logits

    def wait(self) -> None:
        """Until no compilation is under way."""
        for variant in list(self._variants.values()):
            if variant.coming is not None:
                variant.coming.result()

    def prepare(self, program: Program, shape: ShapeClass, prefill: bool) -> None:
        """With tier="whole": compile the program's form for a phase now."""
        variant = self._variant(program, shape, prefill)
        if self.tier == "whole" and variant.record.state == "cold":
            self._compile(variant, shape, keep=True)

    # ------------------------------------------------------------------------------------------------- compilation

    def _variant(self, program: Program, shape: ShapeClass, prefill: bool) -> _Variant:
        found = self._variants.get((program, prefill))
        if found is None:
            library, backend = self.library, self.regions.backend
            key = VariantKey.of(
                "whole", library.fingerprint, shape, backend, library.device, library.dtype, program=str(program)
            )
            record = TierRecord(program, "prefill" if prefill else "decode")
            weights = [library.tensors[name] for name in self._names(program)]
            found = self._variants.setdefault((program, prefill), _Variant(record, key, weights))
        return found

    def _names(self, program: Program) -> dict[str, int]:
        """The distinct weights of a program by name, numbered."""
        table = self.library.table
        calls = (table.prologue, *(table.layers[layer] for layer in program.path), table.epilogue)
        return {name: i for i, name in enumerate(dict.fromkeys(n for c in calls for n in c.weights))}

    def _plan(self, program: Program, shape: ShapeClass, prefill: bool) -> WholePlan:
        table, numbers = self.library.table, self._names(program)

        def step(symbol: Symbol, opens: int = 0, closes: tuple[float, ...] = ()) -> WholeStep:
            return WholeStep(symbol.target, symbol.sides, tuple(numbers[n] for n in symbol.weights), opens, closes)

        steps = tuple(step(table.layers[s.layer], s.opens, s.closes) for s in program.schedule())
        start, head = step(table.prologue), step(table.epilogue)
        one = [start.target, *(s.target for s in steps), head.target]
        files: dict[str, Wanted] = {name: (name, shape.decode) for name in one}
        if prefill:
            files |= {f"{name}*": (name, shape) for name in one[:-2]}
            files["kv"] = (steps[-1].target + KV_WRITES, shape)
        bodies = {name: str(path) for name, path in zip(files, self.regions.graph_files(list(files.values())), strict=True)}
        return WholePlan(prefill, bodies, start.weights, steps, head)

    def _compile(self, variant: _Variant, shape: ShapeClass, keep: bool, worker: Worker | None = None) -> None:
        """Make and load the whole form; with `keep` it is used from now on, else it is tried first."""
        record, store = variant.record, self.regions.store
        assert store is not None and self._job is not None
        record.state = "compiling"
        start = time.perf_counter()
        prefill = record.phase == "prefill"
        own = worker or Worker()

        def make(folder: Any) -> None:
            plan = self._plan(record.program, shape, prefill).to_dict()
            own.run({**self._job, "folder": str(folder), "threads": torch.get_num_threads(), "whole": plan})  # type: ignore[dict-item]

        try:
            files, _ = store.get_or_make(variant.key.digest, variant.key.facts(), make)
            self._load(variant, shape)
        except PolarError as error:
            record.state, record.reason = "linked", str(error)
            if keep:
                raise
            log.warning("%s of %s stays linked: %s", record.phase, record.program, error)
            return
        finally:
            if worker is None:
                own.close()
        record.compile_s = time.perf_counter() - start
        record.num_bytes = sum(p.stat().st_size for p in files.values())
        record.state = "whole" if keep else "trial"
        log.info("compiled %s of %s whole in %.1f s", record.phase, record.program, record.compile_s)

    def _load(self, variant: _Variant, shape: ShapeClass) -> Region:
        store, backend = self.regions.store, self.regions.backend
        assert store is not None and isinstance(backend, PersistentBackend)
        files = store.get(variant.key.digest, variant.key.facts())
        if files is None:  # evicted or damaged since: once more
            self._compile(variant, shape, keep=True)
            region = self._cache.get(variant.key)
            assert region is not None
            return region
        region = backend.load(files)
        self._cache.put(variant.key, region, sum(p.stat().st_size for p in files.values()))
        return region

    # --------------------------------------------------------------------------------------------------- promotion

    def _promote(self, variant: _Variant, shape: ShapeClass) -> None:
        with self._lock:
            if variant.record.state != "cold":
                return
            variant.record.state = "compiling"
            if self._thread is None:
                self._worker = Worker(nice=10)
                self._thread = ThreadPoolExecutor(1, "polar_fx-tier")
                self._closing = weakref.finalize(self, _close, self._thread, self._worker)
        variant.coming = self._thread.submit(self._compile, variant, shape, False, self._worker)

    def _decide(self, variant: _Variant) -> None:
        record = variant.record
        with self._lock:
            if record.state != "trial":
                return
            record.linked_ms, record.whole_ms = (1e3 * statistics.median(t) for t in (variant.linked, variant.whole))
            faster = 1 - record.whole_ms / record.linked_ms
            record.state = "whole" if faster >= self.policy.margin else "linked"
            what = f"whole is {100 * abs(faster):.1f} % {'faster' if faster >= 0 else 'slower'} than linked"
            record.reason = what if record.state == "whole" else f"{what}; kept only from {100 * self.policy.margin:.0f} % on"
            if record.state == "linked":
                self._cache.drop(variant.key)
        log.info("%s of %s: %s", record.phase, record.program, record.reason)


def _close(thread: ThreadPoolExecutor, worker: Worker) -> None:
    worker.close()
    thread.shutdown(wait=False, cancel_futures=True)
