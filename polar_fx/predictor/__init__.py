"""Which program an input should run: features, menus, policies and the selector.

Nothing here runs the model or searches.
"""
