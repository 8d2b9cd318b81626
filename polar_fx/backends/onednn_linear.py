"""`onednn_linear` (passes/linear_to_onednn.py) in regions: a call of oneDNN from Inductor's code.

The adapter around Inductor's node for that call, which it makes itself only for weights that are
constants of the graph; nothing else in the project touches it.
"""

import functools
import platform
from typing import Any

import torch

from ..environment import processor_lines
from ..passes.linear_to_onednn import onednn_linear

ONEDNN_LINEAR: Any = torch.ops.polar_fx.onednn_linear.default
assert onednn_linear._opoverload is ONEDNN_LINEAR


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than what torch takes for them: MKL,
    which uses AVX-512 on Intel's processors alone.
    """
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    lines = processor_lines()
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


def register() -> None:
    """Teach Inductor the call, in this process. Imports Inductor, which takes seconds."""
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering  # isort: skip (mkldnn_ir needs it)
    from torch._inductor.mkldnn_ir import LinearUnary

    @register_lowering(ONEDNN_LINEAR, type_promotion_kind=None)
    def _(x: Any, weight: Any, bias: Any = None) -> Any:
        return ir.TensorBox.create(LinearUnary.create(x, weight, bias, "none", [], ""))
