"""Captured decodes: on CUDA a linked program is one launch a token instead of one for every kernel.

A linked decode is a fixed sequence of kernels on fixed addresses. It is captured into a CUDA graph
when it first runs and replayed from then on. All graphs take their intermediate values from one
memory pool: they never run at the same time, and none leaves anything in the pool that is read
later.

Shape legend: B batch, V vocabulary; a decode is of one token a row.
"""

import contextlib
import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..program import Program
from .link import LinkedProgram, StepInputs

log = logging.getLogger("polar_fx.cuda_graphs")

_MAX_REMEMBERED = 1024  # records, and programs that failed
_TRIES = 3  # failures after which nothing further is tried, if nothing was ever captured
_MAX_POOLS = 8  # new ones after failures: each keeps the memory it took
_GRACE = 4  # a graph used in the last _GRACE * limit runs is not dropped for a new one

# Linked program, batch and the addresses of the slots.
_Key = tuple[int, ...]

# Shape and type of a run's logits.
_Output = tuple[torch.Size, torch.dtype]


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class GraphApi(Protocol):
    """What is needed of CUDA; tests put something else in its place."""

    def new_pool(self) -> Any:
        """A memory pool that captures may share."""
        ...

    def capture(self, pool: Any, function: Callable[[], object]) -> Graph:
        """The work `function` launches, recorded, not run, its memory taken from `pool`.

        Raises RuntimeError if it cannot be; the current stream is the same afterwards, and not
        capturing.
        """
        ...

    def wait(self) -> None:
        """Order what comes next on the current stream behind the work of the stream that called
        this last.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device is idle; raises what went wrong on it."""
        ...


class CudaApi:
    """CUDA graphs of one device.

    A capture neither waits for the device nor empties its caches, as `torch.cuda.graph` does:
    requests would pay for it.
    """

    # beginning one capture would break another that is under way
    _capturing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for all captures, as a pool reuses memory within a stream alone. Nothing else
        # runs on it: the cuBLAS workspace of this stream is then allocated in a capture, that is in
        # the pool, which matters because resetting a graph drops the workspace of its stream
        # (pytorch#193402) and the others that use it must find it mapped.
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None
        # held: a pool that no graph uses would be given up
        self._pools: list[torch.cuda.MemPool] = []

    def new_pool(self) -> Any:
        self._pools.append(torch.cuda.MemPool())
        return self._pools[-1].id

    def capture(self, pool: Any, function: Callable[[], object]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with self._capturing, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            ended = False
            try:
                # other threads may allocate meanwhile
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
                    ended = True
            except BaseException:
                self._mend(None if ended else pool)
                raise
        return graph

    def _mend(self, pool: Any) -> None:
        """Undo what torch leaves after a capture that could not be begun or ended (pytorch#180395).

        The pool, unless it is None, would go on taking every allocation of this stream, and the
        generator would refuse ordinary calls.
        """
        index = torch.cuda.current_device()
        if pool is not None:
            # it is not recording: the capture failed before that
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
        generator = torch.cuda.default_generators[index]
        state = generator.get_state()
        try:
            torch.empty(1, device=self.device).uniform_()
        except RuntimeError:  # it believes that it is being captured
            fresh = torch.Generator(self.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
        else:
            generator.set_state(state)

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class GraphRecord:
    """One attempt to capture: milliseconds it took, the pool it drew from, and the reason if it
    failed.
    """

    program: Program
    batch: int
    capture_ms: float
    pool: Any
    reason: str | None = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Buffers:
    """What goes in and comes out at fixed addresses: ids and positions i64[B, 1], logits [B, 1, V].

    Allocated outside the pool and shared by all graphs of a batch size, so that no graph keeps
    anything in the pool.
    """

    ids: Tensor
    positions: Tensor
    logits: Tensor

    def fill(self, inputs: StepInputs) -> None:
        self.ids.copy_(inputs.ids)
        self.positions.copy_(inputs.positions)


@dataclass(eq=False, slots=True)
class _Captured:
    """A graph and what must outlive it: the linked program owns the weights and keeps its id from
    being another's.

    Slots are not held. Only a caller whose slots lie at the captured addresses meets the graph, and
    those it holds itself.
    """

    graph: Graph
    linked: LinkedProgram
    buffers: _Buffers
    last_run: int


class CudaGraphs:
    """Runs linked decodes of one model as CUDA graphs; at most `limit` are kept (0: none are made).

    The least recently used is dropped for a new one, but not while all are in use: beyond the
    limit a program runs uncaptured, which is cheaper than recapturing; a program whose capture
    failed always does. `records` and the log say why.
    """

    def __init__(self, api: GraphApi, limit: int = 64) -> None:
        self.limit = limit
        self._api, self._pool = api, api.new_pool()
        self._graphs: OrderedDict[_Key, _Captured] = OrderedDict()
        self._buffers: WeakValueDictionary[tuple[Any, ...], _Buffers] = WeakValueDictionary()
        self._failed: dict[tuple[Program, int], None] = {}
        self._loaded: set[tuple[int, Hashable]] = set()
        self._outputs: dict[int, _Output] = {}  # by number of rows
        self._records: deque[GraphRecord] = deque(maxlen=_MAX_REMEMBERED)
        self._num_runs = self._num_captured = 0
        self._lock = threading.Lock()

    @property
    def records(self) -> tuple[GraphRecord, ...]:
        """The latest attempts to capture, oldest first."""
        return tuple(self._records)

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, linked: LinkedProgram, inputs: StepInputs) -> Tensor:
        """Logits [B, 1, V] of one token a row, a tensor of the caller's own.

        Writes the slots in place. The first run of a program, batch size and set of slots captures
        and replays. Where it needs code that has not run for this batch size yet, the first run is
        an ordinary one, and the capture follows it; a program that cannot be captured runs as it is
        linked. Sessions of a program meet their graph again as far as the pool hands out the same
        slots in the same order. Raises ProgramError as `LinkedProgram.run` does.
        """
        batch, tokens = inputs.ids.shape
        assert tokens == 1 and inputs.resume is None, "a decode is of one token a row"
        linked.check(inputs)
        # not the address of kv_index: it is the linked program's own
        key = (id(linked), batch, *(t.data_ptr() for pair in inputs.slots for t in pair))
        with self._lock:
            self._num_runs += 1
            captured = self._graphs.get(key)
            if captured is None:
                worthwhile = self._is_worthwhile(linked.program, batch)
                loaded = worthwhile and self._is_loaded(linked, batch)
                out = self._outputs.get(batch) if loaded else None
                if out is not None:
                    captured = self._capture(key, linked, inputs=inputs, out=out)
                if captured is None:
                    # This loads the kernels as well, which a capture must not do. It need not
                    # happen on the side stream: what is loaded is the device's, and the side stream
                    # is to be kept free (see CudaApi).
                    logits = linked.run(inputs)
                    if worthwhile and out is None:
                        out = self._outputs[batch] = logits.shape, logits.dtype
                        self._loaded |= _code(linked, batch)
                        self._capture(key, linked, inputs=inputs, out=out)
                    return logits
            self._graphs.move_to_end(key)
            captured.last_run = self._num_runs
            # buffers and pool are shared, and the caller may be on another stream than the last one
            self._api.wait()
            captured.buffers.fill(inputs)
            captured.graph.replay()
            return captured.buffers.logits.clone()

    def _is_loaded(self, linked: LinkedProgram, batch: int) -> bool:
        """Whether every kernel of a run is on the device, because programs of the same regions have
        run.
        """
        return _code(linked, batch) <= self._loaded

    def _is_worthwhile(self, program: Program, batch: int) -> bool:
        if self.limit < 1 or (program, batch) in self._failed:
            return False
        if not self._num_captured and len(self._failed) >= _TRIES:
            return False
        if len(self._graphs) < self.limit:
            return True
        oldest = next(iter(self._graphs.values()))
        return self._num_runs - oldest.last_run > _GRACE * self.limit

    def _capture(
        self,
        key: _Key,
        linked: LinkedProgram,
        *,
        inputs: StepInputs,
        out: _Output,
    ) -> "_Captured | None":
        """Capture such a run; on failure, remember and log the reason."""
        buffers = self._static(inputs, out)
        at_buffers = replace(inputs, ids=buffers.ids, positions=buffers.positions)
        self._api.wait()  # a graph that uses these buffers may still run on another stream
        # A capture writes nothing. Should a part of it run after all, it writes this token's keys
        # and values once more.
        buffers.fill(inputs)
        handled, start = sys.exception(), time.perf_counter()
        reason, graph = None, None
        try:
            graph = self._api.capture(
                self._pool, lambda: buffers.logits.copy_(linked.run(at_buffers))
            )
        except RuntimeError as error:  # CUDA's errors and want of memory are among them
            reason = _first_cause(error, handled)
        milliseconds = 1e3 * (time.perf_counter() - start)
        program, batch = linked.program, len(inputs.ids)
        self._records.append(GraphRecord(program, batch, milliseconds, self._pool, reason))
        if graph is None:
            self._fail(program, batch, reason=reason)
            return None
        log.info("captured %s for batch %d in %.1f ms", program, batch, milliseconds)
        self._num_captured += 1
        made = self._graphs[key] = _Captured(graph, linked, buffers, self._num_runs)
        while len(self._graphs) > self.limit:
            self._api.synchronize()  # it may still be running on another stream
            self._graphs.popitem(last=False)[1].graph.reset()
        return made

    def _fail(self, program: Program, batch: int, *, reason: str | None) -> None:
        log.warning("%s runs without a CUDA graph for batch %d: %s", program, batch, reason)
        self._failed[program, batch] = None
        if len(self._failed) > _MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        if not self._num_captured and len(self._failed) == _TRIES:
            log.warning("no decode could be captured; none is tried any more")
        self._api.synchronize()
        if len(self._failed) <= _MAX_POOLS:
            # what the failed one left in the other is unknown; graphs keep theirs
            self._pool = self._api.new_pool()

    def _static(self, inputs: StepInputs, out: _Output) -> _Buffers:
        shape, dtype = out
        key = (shape, dtype, inputs.ids.dtype)
        if (buffers := self._buffers.get(key)) is None:
            # or they could not be filled outside of inference mode again
            with torch.inference_mode(False):
                ids, places = (
                    torch.empty(t.shape, dtype=t.dtype, device=t.device)
                    for t in (inputs.ids, inputs.positions)
                )
                logits = torch.empty(shape, dtype=dtype, device=inputs.positions.device)
            buffers = self._buffers[key] = _Buffers(ids, places, logits)
        return buffers


def cuda_graphs(device: torch.device, *, states: bool = False) -> CudaGraphs | None:
    """Those of a device; None if it has none, and for a model that keeps states: to capture a
    decode may run a part of it, which a state would not forget.
    """
    return CudaGraphs(CudaApi(device)) if device.type == "cuda" and not states else None


def _code(linked: LinkedProgram, batch: int) -> set[tuple[int, Hashable]]:
    """What decides the kernels of a run: its regions, whether it blends, and the number of rows."""
    chain = linked.chain
    assert chain.epilogue is not None
    regions: list[Hashable] = [
        chain.prologue,
        chain.epilogue.code,
        *(step.code for step in chain.steps),
    ]
    blends: list[Hashable] = ["blend"] if any(step.closes for step in chain.steps) else []
    return {(batch, part) for part in regions + blends}


def _first_cause(error: BaseException, handled: BaseException | None) -> str:
    """What went wrong first: an operation that breaks a capture makes ending it fail as well.

    `handled` is what the caller was handling before; it is no cause.
    """
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
