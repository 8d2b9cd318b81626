"""Weights, and keys and values, in memory pages of 2 MB.

Each token reads all weights once, and all keys and values of its row. In pages of 4 KB a part of
that time goes to the translation of addresses: a fifth of a row's token and a third of eight rows'
in float32, and half of what attention over many columns takes (docs/performance.md).
Linux has larger pages for memory that asks for them, by `madvise(2)`; its usual setting,
"madvise", gives them to nothing else.
"""

import logging
import math
import mmap
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MEMORY = Path("/proc/meminfo")
_ALIGNMENT = 64  # bytes, as torch's allocator aligns
_LEAST_PAGES = 8  # less than that is translated without misses
_lock = threading.Lock()
# Memory that was made here, as long as a tensor uses it, and its addresses.
_held: "weakref.WeakKeyDictionary[mmap.mmap, range]" = weakref.WeakKeyDictionary()


def page_size() -> int | None:
    """Bytes of a huge page; None where the system has none for those who ask."""
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return None
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None


@torch.no_grad()
def hold_in_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Move the values of tensors on the CPU into huge pages, and return how many bytes moved.

    Each tensor stays the object it is and keeps its shape, strides and values; its address is
    another one, and no other thread may compute with it meanwhile. What is smaller than a few pages
    in all, lies there already, is shared with other processes or with tensors that are not given,
    or would not fit twice into the memory that is free, stays where it is.
    """
    page = page_size()
    if page is None:
        return 0
    with _lock:
        groups = _groups(tensors)
        total = sum(_padded(each[0].untyped_storage().nbytes()) for each in groups)
        if total < _LEAST_PAGES * page:
            return 0
        if total > (free := _free_memory()):
            _log.info("weights of %d bytes stay in small pages: %d bytes are free", total, free)
            return 0
        try:
            memory, offset = _memory(total, page)
        except OSError as error:
            _log.info("weights of %d bytes stay in small pages: %s", total, error)
            return 0
        start = _address(memory)
        _held[memory] = range(start, start + len(memory))
        for group in groups:
            _move(group, memory, offset=offset)
            offset += _padded(group[0].untyped_storage().nbytes())
    return total


def zeros(size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU: in huge pages if it is larger than a few of them and the system
    has some.
    """
    page, num_bytes = page_size(), math.prod(size) * dtype.itemsize
    if page is None or num_bytes < _LEAST_PAGES * page:
        return torch.zeros(*size, dtype=dtype)
    try:
        memory, offset = _memory(num_bytes, page)
    except OSError as error:
        _log.info("a tensor of %d bytes lies in small pages: %s", num_bytes, error)
        return torch.zeros(*size, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=num_bytes)
    return flat.view(dtype).view(*size)


def _memory(num_bytes: int, page: int) -> tuple[mmap.mmap, int]:
    """Memory of zeros that asks for huge pages, and where in it the first of them begins.

    Raises OSError if the system refuses it.
    """
    memory = mmap.mmap(-1, num_bytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -_address(memory) % page


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


def _groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that can move, those of one storage together."""
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if _is_plain(tensor) and not _lies_in_huge_pages(tensor):
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    return [group for group in found.values() if not _has_other_owners(group)]


def _has_other_owners(group: list[Tensor]) -> bool:
    """Whether tensors that are not given share the memory: they would go on with the old one."""
    storage = group[0].untyped_storage()
    # one of each tensor, and one of the object `storage`
    count: Any = torch._C._storage_Use_Count  # type: ignore[attr-defined]
    return count(storage._cdata) > len(group) + 1


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.numel() > 0
        and not (tensor.is_shared() or tensor.is_inference())
    )


def _lies_in_huge_pages(tensor: Tensor) -> bool:
    return any(tensor.data_ptr() in places for places in _held.values())


def _move(group: list[Tensor], memory: mmap.mmap, *, offset: int) -> None:
    """Give the tensors of one storage a storage of their own in `memory`, from a byte on."""
    storage = group[0].untyped_storage()
    values = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=storage.nbytes())
    values.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    for tensor in group:
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        moved = torch.empty(0, dtype=tensor.dtype).set_(values.untyped_storage(), *place)
        tensor.data = moved


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMORY.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
