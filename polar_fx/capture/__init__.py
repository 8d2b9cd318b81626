"""HuggingFace causal LM -> `CapturedModel`. This folder is all that knows how a model is put
together; it knows no model by name.
"""

from .captured import CapturedModel, ColumnsSpec, KvSpec, StateSpec
from .extension import CACHE
from .support import attention_variants, check_supported, embedding_weight, shared_view
from .trace import capture

__all__ = [
    "CACHE",
    "CapturedModel",
    "ColumnsSpec",
    "KvSpec",
    "StateSpec",
    "attention_variants",
    "capture",
    "check_supported",
    "embedding_weight",
    "shared_view",
]
