"""Which program an input should run: features, networks, menus and policies. Nothing here runs the model or searches."""
