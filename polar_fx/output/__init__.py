"""Tools for what is written: files, digests, plain text, the style of figures.

Nothing here knows a model.
"""
