"""The smaller of two sizes, while a model is traced.

Python's `min` compares, and a graph then holds for one outcome alone: for rows shorter than so many
tokens, say. The operator here leaves it open.
"""

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_NAME = "min"


def _min(*given: Any, **options: Any) -> Any:
    """Python's `min`, but for a size that is a symbol and another number."""
    if len(given) == 2 and not options:
        kinds = {*map(type, given)}
        if torch.SymInt in kinds and kinds <= {torch.SymInt, int}:
            return torch.sym_min(*given)
    return builtins.min(*given, **options)


@contextmanager
def sizes_stay_open(view: nn.Module) -> Iterator[None]:
    """Inside it, the modeling files of a view compute the smaller of two sizes as an operator."""
    files = {type(m).__module__ for m in view.modules() if isinstance(m, PreTrainedModel)}
    scopes = [vars(sys.modules[name]) for name in sorted(files)]
    changed = [scope for scope in scopes if _NAME not in scope]
    for scope in changed:
        scope[_NAME] = _min
    try:
        yield
    finally:
        for scope in changed:
            del scope[_NAME]
