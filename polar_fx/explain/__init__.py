"""What was captured, compiled, loaded and linked, and what a program costs.

Looks, never compiles.
"""
