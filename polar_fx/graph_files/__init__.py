"""Programs as files for other runtimes: ONNX graphs, and `torch.export` files.

See docs/export.md.
"""

from .onnx_files import export_onnx
from .program_file import export_program

__all__ = ["export_onnx", "export_program"]
