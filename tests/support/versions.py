"""What tests need of other libraries."""

import pytest
import transformers
from packaging.version import Version


def since_transformers(least: str) -> pytest.MarkDecorator:
    """Skip a case whose model is another one, or refused, in older versions of transformers."""
    return pytest.mark.skipif(
        Version(transformers.__version__) < Version(least),
        reason=f"needs transformers {least} or newer",
    )
