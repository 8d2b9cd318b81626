"""What the workers of the GPU benchmark share: result lines, time limits, their turn on the
machine, and timings.
"""

import contextlib
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import gpu_results
from measure import synchronize, timed

# Inductor tries more tilings of each kernel; matrix-vector products gain most, and have it by
# default (polar_fx.backends).
TUNED: dict[str, Any] = {"coordinate_descent_tuning": True}
UNTUNED: dict[str, Any] = {"coordinate_descent_tuning": False}


def reason(error: BaseException, most: int = 400) -> str:
    """Kind and beginning of what an error says."""
    return f"{type(error).__name__}: {str(error).strip()[:most]}"


@dataclass
class Worker:
    """One process of the benchmark: `out` is the folder of results, `until` when its time is up,
    `turns` where it waits.
    """

    name: str
    out: Path
    device: torch.device
    tiny: bool
    started: float
    until: float
    turns: Path

    # ----------------------------------------------------------------------------- results and time

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, stage: str, **found: Any) -> None:
        """Write one line of results; `t` is the second of the benchmark."""
        line = {"t": round(time.time() - self.started, 1), "stage": stage, **found}
        gpu_results.append(self.out / "results.jsonl", line)
        print(str(line)[:400], flush=True)

    @contextlib.contextmanager
    def attempt(self, stage: str, **about: Any) -> Iterator[None]:
        """What fails is written down, and the next thing goes on."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.say(
                stage, **about, error=reason(error), seconds=round(time.perf_counter() - start, 1)
            )

    def left(self) -> float:
        """Seconds left."""
        return self.until - time.time()

    def wait_for_turn(self) -> None:
        """All is prepared; from here on the machine is this worker's alone, until a new `until`."""
        gc.collect()
        (self.turns / f"ready.{self.name}").touch()
        turn = self.turns / f"turn.{self.name}"
        while not turn.exists():
            time.sleep(0.05)
        self.until = float(turn.read_text())

    def finished(self) -> None:
        """Nothing more will be timed."""
        (self.turns / f"done.{self.name}").touch()

    # -------------------------------------------------------------------------------------- timings

    def synchronize(self) -> None:
        synchronize(self.device)

    def milliseconds(
        self, work: Callable[[], Any], repeats: int, *, inner: int = 1
    ) -> dict[str, float]:
        """Median, least and most of `repeats` timings of `inner` calls each, per call."""

        def calls() -> None:
            for _ in range(inner):
                work()

        taken = [timed(calls, self.device) / inner for _ in range(repeats)]
        return {
            "ms": round(statistics.median(taken), 4),
            "min": round(min(taken), 4),
            "max": round(max(taken), 4),
        }

    def captured(self, work: Callable[[], Any]) -> Any:
        """`work`, run and then captured as a CUDA graph; on the CPU something that runs it when
        replayed.
        """
        work()
        if not self.on_gpu:
            return SimpleNamespace(replay=work)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    def replay_ms(self, graph: Any, repeats: int = 3, *, inner: int = 20) -> float:
        """Milliseconds of the device alone: the graph replayed back to back between two events,
        `repeats * (inner + 1)` times.
        """
        if not self.on_gpu:
            return self.milliseconds(graph.replay, repeats, inner=min(inner, 2))["ms"]
        taken = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            begin.record()
            for _ in range(inner):
                graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / inner)
        return round(statistics.median(taken), 4)
