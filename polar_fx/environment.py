"""The one place that reads the environment.

| variable | meaning | default | |---|---|---| | POLAR_FX_CACHE_DIR | converted models and compiled
artifacts | the user's cache folder | | POLAR_FX_CACHE_LIMIT | size of all compiled artifacts, such
as 500MB, 4GiB or bytes; 0: no limit | 4GiB |
"""

import math
import os
import re
from decimal import Decimal
from pathlib import Path

import platformdirs

from .errors import InputError

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
