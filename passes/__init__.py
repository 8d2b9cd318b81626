"""Compiler passes: graph -> graph.

They import torch.fx and the standard library only; imported as `polar_fx.passes`.
"""

if __name__ == "passes":
    raise ImportError("this folder is the package polar_fx.passes; write `import polar_fx.passes`")

from .base import Pass, PassError, PassResult
from .pipeline import (
    PASSES,
    PassRecord,
    Pipeline,
    PipelineResult,
    flat_pipeline,
    library_pipeline,
    program_pipeline,
    region_pipeline,
)
from .text import graph_diff, graph_fingerprint, graph_text
from .verify import VerifyError, verify, verify_region

__all__ = [
    "PASSES",
    "Pass",
    "PassError",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "PipelineResult",
    "VerifyError",
    "flat_pipeline",
    "graph_diff",
    "graph_fingerprint",
    "graph_text",
    "library_pipeline",
    "program_pipeline",
    "region_pipeline",
    "verify",
    "verify_region",
]
