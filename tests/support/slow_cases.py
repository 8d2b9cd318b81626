"""Cases of a test that `make check` leaves to `make check-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# Families whose layers are built as those of another family.
LIKE_ANOTHER = frozenset(
    {"apertus", "arcee", "biogpt", "codegen", "cohere", "ernie4_5", "gemma", "glm4", "gpt_neox"}
    | {"granite", "helium", "hunyuan_v1_dense", "mistral", "mixtral", "olmo", "olmo2", "olmoe"}
    | {"persimmon", "phi", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "stablelm", "starcoder2"}
)


def some_slow(cases: Iterable[str], slow: Collection[str] = LIKE_ANOTHER) -> list[Any]:
    """Parameters of a test, those in `slow` marked so."""
    return [pytest.param(c, marks=pytest.mark.slow) if c in slow else c for c in cases]
