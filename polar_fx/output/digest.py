"""Digests of facts: what things on disk are named by."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(facts: Mapping[str, Any]) -> str:
    """The sha256 of the facts, whatever their order: 64 hex digits, the same in every process."""
    return hashlib.sha256(canonical(facts).encode()).hexdigest()


def canonical(facts: Mapping[str, Any]) -> str:
    """The facts as JSON, the same text whatever their order."""
    return json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
