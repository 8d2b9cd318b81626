"""The version of polar_fx."""

__version__ = "0.1.0"
