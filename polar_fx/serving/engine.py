"""The former names of what runs requests; see `service`."""

from .service import Ask
from .service import Service as Engine

__all__ = ["Ask", "Engine"]
