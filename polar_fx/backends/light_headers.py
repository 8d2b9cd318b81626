"""Regions are compiled with a lighter `<regex>`.

torch's runtime of regions, a copy of which is compiled into each of them, takes the name of a
device apart by `std::regex`. Its templates are half of the C++ compile time of a region's wrapper
(5.3 against 2.6 s of an Intel Xeon's time, torch 2.13, gcc 12), which a folder of headers that the
compiler searches first saves.
"""

import functools
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ..environment import searched_first

FOLDER = Path(__file__).parent / "include"
_RUNTIME = "torch/csrc/inductor"
# All that the lighter one is made for, which is all that torch 2.11 to 2.15 write there.
_OFFERED = re.compile(
    r"""
    \#include\ <regex>
    | std::regex\ re\("\(cpu\|cuda\|xpu\|mps\)\(:\(\[0-9\]\+\)\)\?"\);
    | std::smatch\ sm;
    | std::regex_match\(device_str,\ sm,\ re\)
    | \bsm\[[0-3]\]\.(str\(\)|matched\b)
    """,
    re.VERBOSE,
)
_NAMES = re.compile(r"regex|[csw]match\b|sub_match|\bsm\b")


def asks_for_more(folder: Path) -> bool:
    """Whether headers of a folder use something of `<regex>` that the lighter one has not."""
    text = "\n".join(header.read_text(encoding="utf-8") for header in folder.rglob("*.h"))
    return _NAMES.search(_OFFERED.sub("", text)) is not None


@functools.cache
def are_enough() -> bool:
    """Whether the runtime of this torch asks no more of `<regex>` than the lighter one offers."""
    return not asks_for_more(Path(torch.__file__).parent / "include" / _RUNTIME)


def light_headers() -> AbstractContextManager[None]:
    """Let compilers that are started within it find the lighter headers first, if they are enough.

    In code that Inductor does not compile they are the usual ones.
    """
    return searched_first("CPLUS_INCLUDE_PATH", FOLDER) if are_enough() else nullcontext()
