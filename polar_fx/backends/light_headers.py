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
_RUNTIME = "torch/csrc/inductor/aoti_runtime"
_NAMES = re.compile(r"regex|[csw]match|sub_match")
# Every use of it that the lighter one is made for: those of torch 2.11 to 2.15.
_USES = {
    "#include <regex>",
    'std::regex re("(cpu|cuda|xpu|mps)(:([0-9]+))?");',
    "bool matched = std::regex_match(device_str, sm, re);",
    "std::smatch sm;",
}


def uses_of_regex(folder: Path) -> set[str]:
    """The lines of a folder's headers that name something of `<regex>`."""
    text = "\n".join(header.read_text(encoding="utf-8") for header in folder.glob("*.h"))
    return {line.strip() for line in text.splitlines() if _NAMES.search(line)}


@functools.cache
def are_enough() -> bool:
    """Whether this torch asks of `<regex>` what the lighter one offers, and no more."""
    folder = Path(torch.__file__).parent / "include" / _RUNTIME
    return uses_of_regex(folder) == _USES


def light_headers() -> AbstractContextManager[None]:
    """Let compilers that are started within it find the lighter headers first, if they are enough.

    In code that Inductor does not compile they are the usual ones.
    """
    return searched_first("CPLUS_INCLUDE_PATH", FOLDER) if are_enough() else nullcontext()
