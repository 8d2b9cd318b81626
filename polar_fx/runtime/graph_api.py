"""What is needed of CUDA to capture work and replay it.

A captured graph is one launch instead of one for every kernel.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch


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
