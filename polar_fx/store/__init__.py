"""Artifacts on disk: content-addressed, checksummed, locked. Knows nothing of models."""

from .entry import Entry, StoredFile, total_bytes
from .store import ArtifactStore, Refusal

__all__ = ["ArtifactStore", "Entry", "Refusal", "StoredFile", "total_bytes"]
