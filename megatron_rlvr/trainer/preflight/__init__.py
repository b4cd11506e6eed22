"""A look at a run before any node is taken."""
