"""Policy losses, one a file, found by name."""
