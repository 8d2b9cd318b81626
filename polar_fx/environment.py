"""The one place that reads the environment, and knows how this package is installed.

| variable | meaning | default | |---|---|---| | POLAR_FX_CACHE_DIR | converted models and compiled
artifacts | the user's cache folder | | POLAR_FX_CACHE_LIMIT | size of all compiled artifacts, such
as 500MB, 4GiB or bytes; 0: no limit | 4GiB | | POLAR_FX_LOG | log lines of commands: debug, info,
warning or error | warning |
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import platformdirs

from .errors import InputError
from .version import __version__

_SOURCE = Path(__file__).resolve().parents[1]
_DEFAULT_LIMIT = "4GiB"
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_PREFIX = "POLAR_FX_"
_RUNNABLE = Path("/proc/loadavg")
_LOOKS, _PAUSE = 5, 0.004  # how often is looked, and seconds in between
_PROCESSOR = Path("/proc/cpuinfo")
_searched_lock = threading.Lock()
_searched_by: Counter[str] = Counter()  # how many are within `searched_first`, by variable
_searched_before: dict[str, str | None] = {}
BUSY = 0.5
"""Runnable threads of others, for each core, from which threads wait for one another."""


def log_level() -> int | None:
    """The level from which commands show log lines; None if none is named. Raises InputError."""
    text = os.environ.get("POLAR_FX_LOG", "").strip().lower()
    if text and text not in _LEVELS:
        raise InputError(f"POLAR_FX_LOG={text!r} is no level; use one of {', '.join(_LEVELS)}")
    return _LEVELS.get(text)


def park_waiting_threads() -> None:
    """Let compute threads sleep while they wait for one another, where other processes keep the
    cores busy now and the user did not say how they wait.

    Spinning is faster on free cores, and takes them from what the thread that is waited for needs
    on busy ones. OpenMP reads it once, when torch is loaded. What it is worth: docs/performance.md.
    """
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not said and _running_elsewhere() >= BUSY * (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _running_elsewhere() -> float:
    """Threads of others that want to run, the median of a few looks; 0 where Linux does not say."""
    looks: list[int] = []
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE)
        try:
            runnable = _RUNNABLE.read_text().split()[3].partition("/")[0]
        except OSError:
            return 0
        looks.append(int(runnable) - 1)  # without the thread that looks
    return statistics.median(looks)


def processor_lines() -> list[str]:
    """What Linux says of the processors, "name : value" a line; empty where it says nothing."""
    return _PROCESSOR.read_text(encoding="utf-8").splitlines() if _PROCESSOR.exists() else []


def processor_name() -> str:
    """As the system calls it."""
    lines = processor_lines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@contextlib.contextmanager
def searched_first(variable: str, folder: Path) -> Iterator[None]:
    """Let processes that are started within it search `folder` before what a variable lists.

    Threads that are in it at the same time, with the same folder, share one change.
    """
    with _searched_lock:
        _searched_by[variable] += 1
        if _searched_by[variable] == 1:
            _searched_before[variable] = before = os.environ.get(variable)
            os.environ[variable] = f"{folder}{os.pathsep}{before}" if before else str(folder)
    try:
        yield
    finally:
        with _searched_lock:
            _searched_by[variable] -= 1
            if _searched_by[variable] == 0:
                os.environ.pop(variable, None)
                if (was := _searched_before.pop(variable)) is not None:
                    os.environ[variable] = was


def environment_variables() -> dict[str, str]:
    """Those of polar_fx that are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIX)}


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def running_facts(packages: Iterable[str]) -> dict[str, Any]:
    """What runs here, as JSON values: versions of polar_fx, Python and these packages, processors,
    and compute threads.
    """
    import torch

    return {
        "polar_fx": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def install_command(extra: str) -> str:
    """What installs the packages of an extra beside this very polar_fx: from the checkout, where it
    runs from one.
    """
    if (_SOURCE / "pyproject.toml").is_file():
        return f"pip install -e '{_SOURCE}[{extra}]'"
    return f"pip install 'polar_fx[{extra}]'"


def cache_dir() -> Path:
    """Folder for everything that can be made again; it may not exist yet."""
    named = os.environ.get("POLAR_FX_CACHE_DIR")
    return (
        Path(named).expanduser()
        if named
        else platformdirs.user_cache_path("polar_fx", appauthor=False)
    )


def cache_limit_bytes() -> int:
    """What all compiled artifacts may take on disk; 0 is no limit. Raises InputError."""
    text = os.environ.get("POLAR_FX_CACHE_LIMIT", "").strip() or _DEFAULT_LIMIT
    units = {unit.lower(): size for unit, size in _UNITS.items()} | {"": 1}
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.lower())
    if not match or match[2] not in units:
        raise InputError(
            f"POLAR_FX_CACHE_LIMIT={text!r} is not a size; give a number of bytes, or one with a "
            f"unit ({', '.join(_UNITS)}), such as 500MB; 0 is no limit"
        )
    return math.ceil(Decimal(match[1]) * units[match[2]])
