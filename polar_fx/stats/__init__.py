"""Statistics: how well routing inputs to programs of layers does against the identity, and how far
to believe it.
"""
