"""Regions by name and shape class: from memory, from the artifact store, or compiled, several at
once.

A region's name is its body's; with `.kv` behind it, the body's KV writes alone (see
passes/keep_kv_writes.py).
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..backends.aot_inductor import GRAPH
from ..backends.base import Backend, Dynamic, PersistentBackend, Region, ShapeClass
from ..backends.worker import WorkerPool, compiler_reason, describe, worker_pool
from ..capture.trace import TRACING
from ..errors import CaptureError, CompileError, PolarError
from ..library import LayerLibrary
from ..library.symbols import Operand, addressed
from ..passes.address_kv import AddressKv
from ..passes.keep_kv_writes import KeepKvWrites
from ..store import ArtifactStore
from .code_key import RegionRecord, VariantKey

log = logging.getLogger("polar_fx.regions")

KV_WRITES = ".kv"
KEEP_KV_WRITES = KeepKvWrites()
ADDRESS_KV = AddressKv()

# Example sizes for a dynamic axis: primes, so that no axis is taken for a model dimension of the
# same size.
_BATCH, _TOKENS, _LENGTH, _PLACES = 3, 127, 211, 1553
_MAX_WORKERS = 8

# What a backend that needs no shapes is asked for.
_ANY, _ANY_ADDRESSED = ShapeClass(None, None, 0), ShapeClass(None, None, None)

# A region's name and shape class.
Wanted = tuple[str, ShapeClass]


def split(name: str) -> tuple[str, bool]:
    """Body name, and whether only its KV writes are meant."""
    return name.removesuffix(KV_WRITES), name.endswith(KV_WRITES)


class RegionTable:
    """Every region of a library that is loaded, and how it came to be (`records`).

    `store` None compiles anew in every process; `workers` is how many processes compile at once (0:
    this one alone;
    None: as many as there are processors).
    """

    def __init__(
        self,
        library: LayerLibrary,
        backend: Backend,
        max_length: int,
        store: ArtifactStore | None,
        workers: int | None = None,
    ) -> None:
        self.library, self.backend, self.store = library, backend, store
        self.max_length = max_length
        self.workers = min(_MAX_WORKERS, os.cpu_count() or 1) if workers is None else workers
        self.records: list[RegionRecord] = []
        self._regions: dict[Wanted, Region] = {}
        self._lock = threading.RLock()

    def get(self, wanted: Sequence[Wanted]) -> dict[Wanted, Region]:
        """The wanted regions, made if missing: all of them at once, if workers can.

        Raises CompileError, CaptureError or CacheError; what was made beside a failure is kept.
        """
        places = {w: self._place(*w) for w in wanted}
        if any(p not in self._regions for p in places.values()):
            with self._lock:
                self._make([p for p in dict.fromkeys(places.values()) if p not in self._regions])
        return {w: self._regions[p] for w, p in places.items()}

    def _place(self, name: str, shape: ShapeClass) -> Wanted:
        if self.backend.needs_shapes:
            return name, shape
        return name, _ANY if shape.length is not None else _ANY_ADDRESSED

    def key(self, name: str, shape: ShapeClass) -> VariantKey:
        """The key under which the store keeps a region."""
        target, kv = split(name)
        library, fingerprint = self.library, self.library.table.bodies[target].fingerprint
        passes = (KEEP_KV_WRITES.content_id,) if kv else ()
        passes += (ADDRESS_KV.content_id,) if shape.length is None else ()
        return VariantKey.of(
            "region", fingerprint, shape, self.backend, library.device, library.dtype, passes=passes
        )

    def files(self, name: str, shape: ShapeClass) -> Mapping[str, Path] | None:
        """The stored files of a region, if it is there."""
        if self.store is None:
            return None
        key = self.key(name, shape)
        return self.store.get(key.digest, key.facts())

    def graph_files(self, wanted: Sequence[Wanted]) -> list[Path]:
        """The exported graphs of regions, in the store.

        Raises CompileError if it has no room for all of them.
        """
        self.get(wanted)
        assert isinstance(self.backend, PersistentBackend)
        for name, shape in wanted:
            if self.files(name, shape) is None:  # evicted since it was loaded
                self._build_one(self.backend, name, shape, self.backend.build)
        # again, once all are made: one may have taken another's room
        found = [(w, self.files(*w)) for w in wanted]
        for w, files in found:
            if files is None:
                raise _evicted(*w)
        return [files[GRAPH] for _, files in found if files is not None]

    # ---------------------------------------------------------------------------------- making them

    def _make(self, wanted: list[Wanted]) -> None:
        if isinstance(self.backend, PersistentBackend):
            self._build(self.backend, [w for w in wanted if not self._load(self.backend, *w)])
            return
        for name, shape in wanted:
            start = time.perf_counter()
            region = self.backend.compile_region(*self._source(name, shape))
            if not self.backend.needs_shapes:
                self._regions[name, shape] = region
                continue
            if name == self.library.prologue.target:
                self._check_prologue(region, shape)
            self._keep(name, shape, region, 0, start, "compiled")

    def _load(self, backend: PersistentBackend, name: str, shape: ShapeClass) -> bool:
        """Load a region from the store; False if it is not there, or not any more when its files
        are opened.
        """
        start = time.perf_counter()
        if (files := self.files(name, shape)) is None:
            return False
        try:
            num_bytes, region = _size(files), backend.load(files)
        except Exception:
            if all(p.exists() for p in files.values()):
                raise
            return False
        self._keep(name, shape, region, num_bytes, start, "loaded")
        return True

    def _build(self, backend: PersistentBackend, wanted: list[Wanted]) -> None:
        """Compile several regions, in workers if that helps; a single one, or what a worker cannot
        make, here.
        """
        job = describe(backend)
        if len(wanted) <= 1 or self.workers < 1 or job is None:
            for w in wanted:
                self._build_one(backend, *w, backend.build)
            return
        with TRACING:
            _ = self.library.graph_module  # once, before threads ask for it
        with (
            worker_pool(min(self.workers, len(wanted))) as pool,
            ThreadPoolExecutor(len(wanted)) as threads,
        ):
            made = [
                threads.submit(self._build_one, backend, *w, _in_worker(pool, job)) for w in wanted
            ]
            for future in made:
                # if one fails, the others are finished and kept before that is raised
                future.result()

    def _build_one(
        self,
        backend: PersistentBackend,
        name: str,
        shape: ShapeClass,
        build: Callable[[Path], None],
    ) -> None:
        start = time.perf_counter()
        made: list[tuple[Region, int]] = []

        def make(folder: Path) -> None:
            try:
                with TRACING:  # torch.export is not made for threads
                    backend.export(*self._source(name, shape), folder)
                build(folder)
                # from here: once stored, it may be evicted at any time
                region = backend.load(_files(folder))
            except PolarError:
                raise
            except Exception as error:
                raise CompileError(
                    f"{backend.name} cannot compile {name} for {shape}: {compiler_reason(error)}"
                ) from error
            # before it is stored: what is loaded is not looked at again
            if name == self.library.prologue.target:
                self._check_prologue(region, shape)
            made.append((region, _size(_files(folder))))

        if self.store is None:
            with tempfile.TemporaryDirectory(prefix="polar_fx-") as place:
                make(Path(place))
        else:
            key = self.key(name, shape)
            for _ in range(2):  # what another process makes may be evicted before it is loaded here
                self.store.get_or_make(key.digest, key.facts(), make)
                if made or self._load(backend, name, shape):
                    break
            else:
                raise _evicted(name, shape)
        if made:
            self._keep(name, shape, *made[0], start, "compiled")

    def _keep(
        self,
        name: str,
        shape: ShapeClass,
        region: Region,
        num_bytes: int,
        start: float,
        source: str,
    ) -> None:
        record = RegionRecord(name, str(shape), time.perf_counter() - start, source, num_bytes)
        self._regions[name, shape] = region
        self.records.append(record)
        log.info("%s %s for %s in %.2f s", source, name, shape, record.seconds)

    def _source(self, name: str, shape: ShapeClass) -> tuple[GraphModule, list[Tensor], Dynamic]:
        """Body, example operands and dynamic axes."""
        target, kv = split(name)
        body, operands = self.library.bodies[target], self._operands(target, shape)
        if shape.length is None and any(o.role == "kv" for o in operands):
            body = ADDRESS_KV.run(body).graph_module
        if kv:
            body = KEEP_KV_WRITES.run(body).graph_module
        varying = shape.varying
        dynamic = [{i: a for i, a in o.axes().items() if a in varying} for o in operands]
        example = self._example(target, shape) if self.backend.needs_shapes else []
        return body, example, dynamic

    def _operands(self, target: str, shape: ShapeClass) -> tuple[Operand, ...]:
        operands = self.library.table.bodies[target].operands
        return operands if shape.length is not None else addressed(operands)

    def _example(self, target: str, shape: ShapeClass) -> list[Tensor]:
        sizes = {
            "B": shape.batch or _BATCH,
            "T": shape.tokens or min(_TOKENS, self.max_length),
            "L": shape.length or _LENGTH,
            "P": _PLACES,
        }
        return [o.example(sizes, self.library.device) for o in self._operands(target, shape)]

    @torch.no_grad()
    def _check_prologue(self, region: Region, shape: ShapeClass) -> None:
        """A new prologue must hand on side values laid out as the other regions were compiled to
        read them.
        """
        start = self.library.prologue
        example = self._example(start.target, shape)[:3]
        for operand in example[:2]:
            operand.zero_()
        torch.arange(len(example[2]), out=example[2])
        values = [*example, *region([*example, *start.weights])]
        seen: set[str] = set()
        for call in (*self.library.layers, self.library.epilogue):
            if call.target in seen:
                continue
            seen.add(call.target)
            operands = self._operands(call.target, shape)
            wanted = zip(operands, self._example(call.target, shape), strict=True)
            sides = [example for operand, example in wanted if operand.role == "side"]
            for operand, side in zip(sides, call.sides, strict=True):
                given = values[side]
                if _layout(operand) != _layout(given):
                    raise CaptureError(
                        f"the compiled prologue hands on {tuple(given.shape)} with strides "
                        f"{given.stride()} where {call.target} reads strides {operand.stride()}; "
                        "use backend='eager' and report this model"
                    )


def _evicted(name: str, shape: ShapeClass) -> CompileError:
    return CompileError(
        f"other artifacts took the room of {name} for {shape} in the artifact store before it "
        "could be used; raise POLAR_FX_CACHE_LIMIT"
    )


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Type, sizes, and strides of the axes along which there is anything to step."""
    strides = [
        stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    ]
    return tensor.dtype, tensor.shape, strides


def _files(folder: Path) -> Mapping[str, Path]:
    return {p.name: p for p in folder.iterdir()}


def _size(files: Mapping[str, Path]) -> int:
    return sum(p.stat().st_size for p in files.values())


def _in_worker(pool: WorkerPool, job: dict[str, object]) -> Callable[[Path], None]:
    threads = torch.get_num_threads()
    return lambda folder: pool.run({**job, "folder": str(folder), "threads": threads})
