"""What work of several parts says while somebody waits for it: how far it is, and for how long."""

import logging
import threading
import time

from .plain_text import count, duration

LOGGER = "polar_fx.waiting"
"""Its lines, of level INFO, are what commands show of long work."""

log = logging.getLogger(LOGGER)


class Waiting:
    """Logs the progress of `total` parts, of which up to `at_once` are worked on together.

    It begins with what there is to do, and each `done` logs which part is next, and about how long
    the rest takes. Threads may share it.
    """

    def __init__(self, total: int, what: str, *, at_once: int = 1, why: str = "") -> None:
        self._total, self._what, self._at_once = total, what, at_once
        self._done, self._lock, self._start = 0, threading.Lock(), time.perf_counter()
        log.info("compiling %s%s", count(total, what), f": {why}" if why else "")

    def done(self) -> None:
        """One more part is done."""
        with self._lock:
            self._done += 1
            done, seconds = self._done, time.perf_counter() - self._start
        if done == self._total:
            return
        left = duration(left_s(seconds, done, total=self._total, at_once=self._at_once))
        log.info("%s %d of %d, about %s left", self._what, done + 1, self._total, left)


def left_s(seconds: float, done: int, *, total: int, at_once: int) -> float:
    """About how many seconds the rest takes, where `done` of `total` parts took `seconds`.

    Those under way count as half done.
    """
    under_way = min(at_once, total - done)
    share = (done + under_way / 2) / total
    return seconds * (1 - share) / share
