"""In-flight batching: requests come and go between tokens, and run together whatever their
programs.
"""

from .engine import Engine, EngineSettings
from .request import Generated, Request
from .sampling import Sampling

__all__ = ["Engine", "EngineSettings", "Generated", "Request", "Sampling"]
