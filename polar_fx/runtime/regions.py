"""Regions by name: from memory, from the artifact store, or compiled, several at once."""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..backends.aot_inductor import GRAPH
from ..backends.base import (
    ANY_SHAPE,
    Backend,
    Dynamic,
    PersistentBackend,
    Region,
    RegionName,
    ShapeClass,
)
from ..backends.worker import WorkerPool, compiler_reason, describe, worker_pool
from ..capture.trace import TRACING
from ..errors import CaptureError, CompileError, PolarError
from ..library import LayerLibrary
from ..library.symbols import Operand, addressed
from ..output.waiting import Waiting
from ..passes.address_kv import BLOCK, AddressKv
from ..passes.keep_kv_writes import KeepKvWrites
from ..passes.pipeline import PassRecord, Pipeline, kept_records, region_pipeline
from ..store import ArtifactStore
from .code_key import RegionRecord, VariantKey
from .compiled_before import why_again

log = logging.getLogger("polar_fx.regions")

KEEP_KV_WRITES = KeepKvWrites()
ADDRESS_KV = AddressKv()

# Example sizes for a dynamic axis: primes, so that no axis is taken for a model dimension of the
# same size.
_BATCH, _TOKENS, _BLOCKS, _POOL = 3, 127, 13, 97
_MAX_WORKERS = 8

_ANY_ADDRESSED = ShapeClass(None, None, None)

# Graph, example operands and dynamic axes of a region.
_Source = tuple[GraphModule, list[Tensor], Dynamic]


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
        *,
        max_length: int,
        store: ArtifactStore | None,
        workers: int | None = None,
    ) -> None:
        if backend.name != "eager" and library.device.type != "cpu":  # not verified there yet
            library.require_no_states(f"backend {backend.name!r} on {library.device}")
        self.library, self.backend, self.store = library, backend, store
        self.max_length = max_length
        self.workers = min(_MAX_WORKERS, os.cpu_count() or 1) if workers is None else workers
        self.records: list[RegionRecord] = []
        self._regions: dict[RegionName, Region] = {}
        self._lock = threading.RLock()

    def get(self, wanted: Sequence[RegionName]) -> dict[RegionName, Region]:
        """The wanted regions, made if missing: all of them at once, if workers can.

        Raises CompileError, CaptureError or CacheError; what was made beside a failure is kept.
        """
        places = {name: self._place(name) for name in wanted}
        if any(p not in self._regions for p in places.values()):
            with self._lock:
                self._make([p for p in dict.fromkeys(places.values()) if p not in self._regions])
        return {name: self._regions[place] for name, place in places.items()}

    def one(self, name: RegionName) -> Region:
        """A single region. Raises as `get` does."""
        return self.get([name])[name]

    def _place(self, name: RegionName) -> RegionName:
        """Where it is kept: code for any shape, once for all of them."""
        if self.backend.needs_shapes:
            return name
        return replace(name, shape=ANY_SHAPE if name.shape.length is not None else _ANY_ADDRESSED)

    def key(self, name: RegionName) -> VariantKey:
        """The key under which the store keeps a region."""
        library = self.library
        return VariantKey.of(
            "region",
            library.table.bodies[name.body].fingerprint,
            shape=name.shape,
            backend=self.backend,
            device=library.device,
            dtype=library.dtype,
            passes=tuple(p.content_id for p in self._pipeline(name).passes),
        )

    def files(self, name: RegionName) -> Mapping[str, Path] | None:
        """The stored files of a region, if it is there."""
        if self.store is None:
            return None
        key = self.key(name)
        return self.store.get(key.digest, key.facts())

    def graph_files(self, wanted: Sequence[RegionName]) -> list[Path]:
        """The exported graphs of regions, in the store.

        Raises CompileError if it has no room for all of them.
        """
        self.get(wanted)
        assert isinstance(self.backend, PersistentBackend)
        for name in wanted:
            if self.files(name) is None:  # evicted since it was loaded
                self._build_one(self.backend, name, build=self.backend.build)
        # again, once all are made: one may have taken another's room
        found = [(name, self.files(name)) for name in wanted]
        for name, files in found:
            if files is None:
                raise _evicted(name)
        return [files[GRAPH] for _, files in found if files is not None]

    # ---------------------------------------------------------------------------------- making them

    def _make(self, wanted: list[RegionName]) -> None:
        if isinstance(self.backend, PersistentBackend):
            missing = [name for name in wanted if not self._load(self.backend, name)]
            self._build(self.backend, missing)
            return
        if not self.backend.needs_shapes:
            for name in wanted:
                self._regions[name] = self._compiled(name)[0]
            return
        waiting = Waiting(len(wanted), "region")
        for name in wanted:
            start = time.perf_counter()
            region, passes = self._compiled(name)
            self._check(region, name)
            self._keep(name, region, num_bytes=0, start=start, source="compiled", passes=passes)
            waiting.done()

    def _compiled(self, name: RegionName) -> tuple[Region, tuple[PassRecord, ...]]:
        """A region that lives in this process alone, and what passes did to its graph."""
        try:
            # neither torch.export nor a compiler in this process is made for threads
            with TRACING, kept_records() as those_of_backend:
                source, passes = self._source(name)
                return self.backend.compile_region(*source), (*passes, *those_of_backend)
        except PolarError:
            raise
        except Exception as error:
            raise _failed(self.backend, name, error=error) from error

    def _load(self, backend: PersistentBackend, name: RegionName) -> bool:
        """Load a region from the store; False if it is not there, or not any more when its files
        are opened.
        """
        start = time.perf_counter()
        if (files := self.files(name)) is None:
            return False
        try:
            num_bytes, region = _size(files), backend.load(files)
        except Exception:
            if all(p.exists() for p in files.values()):
                raise
            return False
        self._keep(name, region, num_bytes=num_bytes, start=start, source="loaded")
        return True

    def _build(self, backend: PersistentBackend, wanted: list[RegionName]) -> None:
        """Compile several regions, in workers if that helps; a single one, or what a worker cannot
        make, here.
        """
        if not wanted:
            return
        job = describe(backend) if len(wanted) > 1 and self.workers > 0 else None
        at_once = 1 if job is None else min(self.workers, len(wanted))
        waiting = Waiting(len(wanted), "region", at_once=at_once, why=self._why(wanted))
        if job is None:
            for name in wanted:
                self._build_one(backend, name, build=backend.build)
                waiting.done()
            return
        with TRACING:
            _ = self.library.graph_module  # once, before threads ask for it

        def make(name: RegionName) -> None:
            self._build_one(backend, name, build=build)
            waiting.done()

        with worker_pool(at_once) as pool, ThreadPoolExecutor(len(wanted)) as threads:
            build = _in_worker(pool, job)
            made = [threads.submit(make, name) for name in wanted]
            for future in made:
                # if one fails, the others are finished and kept before that is raised
                future.result()

    def _why(self, wanted: Sequence[RegionName]) -> str:
        """What differs from code that is in the store; empty if there is none."""
        entries = [] if self.store is None else self.store.entries()
        return why_again(map(self.key, wanted), entries)

    def _build_one(
        self, backend: PersistentBackend, name: RegionName, *, build: Callable[[Path], None]
    ) -> None:
        start = time.perf_counter()
        made: list[tuple[Region, int]] = []
        passes: list[PassRecord] = []

        def make(folder: Path) -> None:
            try:
                with TRACING:  # torch.export is not made for threads
                    source, passes[:] = self._source(name)
                    backend.export(*source, folder)
                with kept_records() as those_of_backend:
                    build(folder)
                passes.extend(those_of_backend)
                # from here: once stored, it may be evicted at any time
                region = backend.load(_files(folder))
            except PolarError:
                raise
            except Exception as error:
                raise _failed(backend, name, error=error) from error
            # before it is stored: what is loaded is not looked at again
            self._check(region, name)
            made.append((region, _size(_files(folder))))

        if self.store is None:
            with tempfile.TemporaryDirectory(prefix="polar_fx-") as place:
                make(Path(place))
        else:
            key = self.key(name)
            for _ in range(2):  # what another process makes may be evicted before it is loaded here
                self.store.get_or_make(key.digest, key.facts(), make=make)
                if made or self._load(backend, name):
                    break
            else:
                raise _evicted(name)
        if made:
            region, num_bytes = made[0]
            self._keep(
                name, region, num_bytes=num_bytes, start=start, source="compiled", passes=passes
            )

    def _keep(
        self,
        name: RegionName,
        region: Region,
        *,
        num_bytes: int,
        start: float,
        source: str,
        passes: Iterable[PassRecord] = (),
    ) -> None:
        seconds = time.perf_counter() - start
        self._regions[name] = region
        shapes = str(name.shape)
        self.records.append(
            RegionRecord(name.graph, shapes, seconds, source, num_bytes, tuple(passes))
        )
        log.info("%s %s in %.2f s", source, name, seconds)

    def _source(self, name: RegionName) -> tuple[_Source, tuple[PassRecord, ...]]:
        """What a backend takes, and what made its graph of the body."""
        target, shape = name.body, name.shape
        made = self._pipeline(name).run(self.library.bodies[target])
        operands, varying = self._operands(target, shape), shape.varying
        dynamic: list[dict[int, str]] = []
        for operand in operands:
            axes = operand.axes().items()
            dynamic.append({i: size for i, size in axes if size.rpartition("*")[2] in varying})
        example = self._example(target, shape) if self.backend.needs_shapes else []
        return (made.graph_module, example, dynamic), made.records

    def _pipeline(self, name: RegionName) -> Pipeline:
        """What makes the region's graph of its body."""
        operands = self.library.table.bodies[name.body].operands
        by_address = name.shape.length is None and any(o.role == "kv" for o in operands)
        return region_pipeline((ADDRESS_KV,) * by_address + (KEEP_KV_WRITES,) * name.kv_writes)

    def _operands(self, target: str, shape: ShapeClass) -> tuple[Operand, ...]:
        operands = self.library.table.bodies[target].operands
        return operands if shape.length is not None else addressed(operands)

    def _example(self, target: str, shape: ShapeClass) -> list[Tensor]:
        sizes = {
            "B": shape.batch or _BATCH,
            "T": shape.tokens or min(_TOKENS, self.max_length),
            "L": shape.length or BLOCK * _BLOCKS,
            "W": _BLOCKS,
            "P": _POOL,
        }
        return [o.example(sizes, self.library.device) for o in self._operands(target, shape)]

    @torch.no_grad()
    def _check(self, region: Region, name: RegionName) -> None:
        """A new prologue must make side values of the layout that the other regions were compiled
        to read.
        """
        start, shape = self.library.prologue, name.shape
        if name.body != start.target:
            return
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


def _failed(backend: Backend, name: RegionName, *, error: Exception) -> CompileError:
    return CompileError(f"{backend.name} cannot compile {name}: {compiler_reason(error)}")


def _evicted(name: RegionName) -> CompileError:
    return CompileError(
        f"other artifacts took the room of {name} in the artifact store before it "
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
