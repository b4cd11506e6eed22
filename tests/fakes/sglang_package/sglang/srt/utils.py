def kill_process_tree(pid: int, include_parent: bool) -> None:
    """The real one kills children; the supervisor must not depend on it."""
