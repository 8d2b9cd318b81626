"""Built-in tasks, each a module of cells with their questions."""
