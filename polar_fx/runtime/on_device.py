"""Numbers of the host on a device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Numbers i64[N], or a tensor of the host, on the device; from pinned memory if that is a GPU,
    so that the host does not wait for it.
    """
    values = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.long)
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
