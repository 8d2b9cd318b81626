"""A streamer that times generation from outside, so that any model with `generate` is timed the
same way.
"""

import statistics
import time
from collections.abc import Callable

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Stopwatch(BaseStreamer):
    """Notes when the prompt goes in and when each token comes out; may hand the tokens on to
    `show`.
    """

    def __init__(self, show: Callable[[list[int]], None] | None = None) -> None:
        self.times: list[float] = []
        self.show = show

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.show and len(self.times) > 1:  # the first is the prompt
            self.show(value.flatten().tolist())

    def end(self) -> None:
        pass

    @property
    def prefill_ms(self) -> float:
        """From the prompt to the first token."""
        return 1e3 * (self.times[1] - self.times[0])

    @property
    def token_ms(self) -> float | None:
        """Median from one token to the next; None if there was only one."""
        gaps = [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        return 1e3 * statistics.median(gaps) if gaps else None
