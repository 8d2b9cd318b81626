"""Compute threads beside other processes: what others keep busy, and which number is fastest."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..environment import BUSY
from ..output.plain_text import count
from .verbosity import status


def load_of_others() -> float | None:
    """Threads that wanted to run in the last minute, for each core; None where the system does not
    tell.

    What this process itself did in that minute is part of it: ask before it computes.
    """
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


def warn_if_busy(threads: int | None = None, *, option: str = "OMP_NUM_THREADS") -> None:
    """Say so on stderr where others keep the cores busy, and what helps.

    `threads` compute (default: torch's number), and `option` sets how many.
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    load = load_of_others()
    if load is None or load <= BUSY or threads == 1:
        return
    text = (
        f"other processes keep {load:.1f} threads for each core busy: {count(threads, 'thread')} "
        "here wait for one another, and a token may take several times as long; "
        f"`python -m polar_fx bench --threads 1 {threads}` measures which number is faster, and "
        f"{option} sets it"
    )
    status().print(text, style="dim", markup=False, soft_wrap=True)


def on_threads(number: int, generate: Callable[..., Any]) -> Callable[..., Any]:
    """The same, by so many compute threads."""
    import torch

    def run(*args: Any, **settings: Any) -> Any:
        torch.set_num_threads(number)
        return generate(*args, **settings)

    return run


def advice(lines: Sequence[Mapping[str, Any]], theirs: str) -> str:
    """Which number of threads decoded fastest, and how to have it.

    `lines` are those of `bench`; contenders whose names begin with `theirs` are not ours.
    """
    fewest = min(line["rows"] for line in lines)
    ours = [
        line
        for line in lines
        if line["rows"] == fewest and not str(line["contender"]).startswith(theirs)
    ]
    best = min(ours, key=lambda line: line["decode_ms"])["threads"]
    return f"fastest here and now: {count(best, 'thread')}; OMP_NUM_THREADS={best} sets that"
