"""A bar for one piece of work: on a terminal a bar with the time left, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how much of `total` is done while the block runs.

    Yields:
        ``advance(count)``.

    Example:
        >>> with progress_bar(Console(), "aime24", 30) as advance:
        ...     advance(1)
    """
    if not console.is_terminal:
        lines = _Lines(console, name, total)
        yield lines.advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


class _Lines:
    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console, self._name, self._total = console, name, total
        self._done = 0
        self._started = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S or (self._done == self._total and count):
            self._said = now
            text = f"{self._name}: {self._done} of {self._total}, {now - self._started:.0f} s"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
