"""Backends that were never run on what they are for."""
