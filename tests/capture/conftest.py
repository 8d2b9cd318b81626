"""These tests are of tracing."""

import pytest


@pytest.fixture(autouse=True)
def _each_is_traced(traced_anew: None) -> None:
    pass
