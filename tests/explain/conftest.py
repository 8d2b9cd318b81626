"""Fixtures that several files of this folder use."""

from pathlib import Path

import pytest

from polar_fx.store import ArtifactStore


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store", 0)
