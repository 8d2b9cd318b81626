"""Fixtures every test may use."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of the embedded default; tests that need meaning are skipped where it is not installed."""
    from polar_fx.errors import ModelNotFoundError
    from polar_fx.models import load_default

    try:
        return load_default()
    except ModelNotFoundError as error:
        pytest.skip(str(error).partition(";")[0])
