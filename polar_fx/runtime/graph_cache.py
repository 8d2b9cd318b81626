"""Captured work by key: which graphs of a model are kept, which are dropped for new ones, and what
could not be captured.

All graphs take their intermediate values from one memory pool: they never run at the same time, and
none leaves anything in the pool that is read later.
"""

import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from ..program import Program
from .graph_api import Graph, GraphApi

log = logging.getLogger("polar_fx.cuda_graphs")

_MAX_REMEMBERED = 1024  # records, and programs that failed
_TRIES = 3  # failures after which nothing further is tried, if nothing was ever captured
_MAX_POOLS = 8  # new ones after failures: each keeps the memory it took
_GRACE = 4  # a graph used in the last _GRACE * limit runs is not dropped for a new one


@dataclass(frozen=True)
class GraphRecord:
    """One attempt to capture: milliseconds it took, the pool it drew from, and the reason if it
    failed. Of rows of several programs, `program` is the order of layers that holds all of them.
    `tokens` a row are several for a prompt.
    """

    program: Program
    batch: int
    capture_ms: float
    pool: Any
    reason: str | None = None
    tokens: int = 1


@dataclass(eq=False, slots=True)
class Captured:
    """A graph, and what must outlive it: `held` owns the buffers and the weights that it reads."""

    graph: Graph
    held: Any
    last_run: int


class GraphCache:
    """Graphs of one model by key; at most `limit` are kept (0: none are made).

    The least recently used is dropped for a new one, but not while all are in use: beyond the limit
    a program runs uncaptured, which is cheaper than recapturing; a program whose capture failed
    always does. `records` and the log say why. Used by one thread at a time, which holds `lock`.
    """

    def __init__(self, api: GraphApi, limit: int = 64) -> None:
        self.limit, self.lock = limit, threading.RLock()
        self._api, self._pool = api, api.new_pool()
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._failed: dict[Hashable, None] = {}
        self._records: deque[GraphRecord] = deque(maxlen=_MAX_REMEMBERED)
        self._num_runs = self._num_captured = 0

    @property
    def records(self) -> tuple[GraphRecord, ...]:
        """The latest attempts to capture, oldest first."""
        return tuple(self._records)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def last_used(self) -> Graph | None:
        """The graph that was replayed last, if any was."""
        return next(reversed(self._graphs.values())).graph if self._graphs else None

    def find(self, key: Hashable) -> Captured | None:
        """The graph of a run that is about to be made, if it was captured."""
        self._num_runs += 1
        return self._graphs.get(key)

    def is_worthwhile(self, subject: Hashable) -> bool:
        """Whether a run that has no graph should be captured; `subject` is what a failure of it
        would be remembered by.
        """
        if self.limit < 1 or subject in self._failed:
            return False
        if not self._num_captured and len(self._failed) >= _TRIES:
            return False
        if len(self._graphs) < self.limit:
            return True
        oldest = next(iter(self._graphs.values()))
        return self._num_runs - oldest.last_run > _GRACE * self.limit

    def capture(
        self,
        key: Hashable,
        function: Callable[[], object],
        *,
        program: Program,
        batch: int,
        held: Any,
        subject: Hashable,
        tokens: int = 1,
    ) -> Captured | None:
        """Capture what `function` launches; None on failure, whose reason is kept and logged."""
        handled, start = sys.exception(), time.perf_counter()
        reason, graph = None, None
        try:
            graph = self._api.capture(self._pool, function)
        except RuntimeError as error:  # CUDA's errors and want of memory are among them
            reason = _first_cause(error, handled)
        milliseconds = 1e3 * (time.perf_counter() - start)
        self._records.append(GraphRecord(program, batch, milliseconds, self._pool, reason, tokens))
        size = f"batch {batch}" if tokens == 1 else f"batch {batch} of {tokens} tokens"
        if graph is None:
            log.warning("%s runs without a CUDA graph for %s: %s", program, size, reason)
            self._fail(subject)
            return None
        log.info("captured %s for %s in %.1f ms", program, size, milliseconds)
        self._num_captured += 1
        made = self._graphs[key] = Captured(graph, held, self._num_runs)
        while len(self._graphs) > self.limit:
            self._drop(next(iter(self._graphs)))
        return made

    def mark(self, key: Hashable, captured: Captured) -> None:
        """Note that a graph is about to be replayed.

        Buffers and pool are shared, and the caller may be on another stream than the last one.
        """
        self._graphs.move_to_end(key)
        captured.last_run = self._num_runs
        self.wait()

    def wait(self) -> None:
        """Order what comes next after the replays of other streams."""
        self._api.wait()

    def drop(self, unusable: Callable[[Hashable], bool]) -> None:
        """Drop the graphs whose keys are such."""
        for key in [key for key in self._graphs if unusable(key)]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self._api.synchronize()  # it may still be running on another stream
        self._graphs.pop(key).graph.reset()

    def _fail(self, subject: Hashable) -> None:
        self._failed[subject] = None
        if len(self._failed) > _MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        if not self._num_captured and len(self._failed) == _TRIES:
            log.warning("nothing like it could be captured; none is tried any more")
        self._api.synchronize()
        if len(self._failed) <= _MAX_POOLS:
            # what the failed one left in the other is unknown; graphs keep theirs
            self._pool = self._api.new_pool()


def _first_cause(error: BaseException, handled: BaseException | None) -> str:
    """What went wrong first: an operation that breaks a capture makes ending it fail as well.

    `handled` is what the caller was handling before; it is no cause.
    """
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
