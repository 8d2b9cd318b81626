"""What every benchmark here shares: machine description, interleaved timing, spread, bandwidth,
result files.

Timings on shared machines drift, so contenders take turns within one process and are compared by
the ratio of medians of the same rounds; warm-up and compilation are outside the timed part.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from polar_fx.environment import processor_name
from polar_fx.output.files import made_folder, write_whole

RESULTS = Path(__file__).parent / "results"


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator; the CPU needs no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, device included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (milliseconds) of the samples, and how many there are."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {"median": middle, "p25": low, "p75": high, "min": min(samples), "n": len(samples)}


def paired_ratio(samples: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Spread of sample / reference of the same round: slow drift of the machine cancels."""
    return spread([a / b for a, b in zip(samples, reference, strict=True)])


def bandwidth_gbs(
    device: torch.device, megabytes: int = 512, *, repeats: int = 9
) -> dict[str, float]:
    """Measured read bandwidth in GB/s by several operators that read memory no cache holds; the
    best of `repeats` each.

    A sum alone would flatter: a maximum, which does less with what it reads, reads faster on some
    machines.
    """
    values = torch.ones(megabytes * 1024 * 1024 // 4, device=device)
    rows, vector = values.view(-1, 4096), torch.ones(4096, device=device)
    reads: dict[str, Callable[[], Any]] = {
        "sum": values.sum,
        "max": values.amax,
        "mv": lambda: torch.mv(rows, vector),
    }
    best = dict.fromkeys(reads, 0.0)
    for _ in range(repeats):
        for name, read in reads.items():
            best[name] = max(best[name], values.numel() * 4 / timed(read, device) / 1e6)
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads and commit: what a reader needs to judge a number."""
    import transformers

    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("-dirty" if _git("status", "--porcelain", "--", "*.py") else ""),
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        described |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return described


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return result.stdout.strip()


def write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    write_whole(text.encode(), made_folder(path.parent) / path.name)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1) + "\n")
