"""What the conversion tools share: a team of torchrun processes, a progress bar, errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_rlvr.weights.conversion import Team

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@contextmanager
def launched_team() -> Iterator[Team]:
    """The processes that torchrun started together, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    dist.init_process_group("gloo")
    try:
        yield Team(rank=dist.get_rank(), size=size, barrier=dist.barrier)
    finally:
        dist.destroy_process_group()


@contextmanager
def progress_bar(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows the share of elements done on stderr: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True, quiet=not shown)
    if not console.is_terminal:
        yield _Lines(what, console)
        return
    columns = TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints every tenth of the way."""

    def __init__(self, what: str, console: Console) -> None:
        self.what = what
        self.console = console
        self.tenths = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // total
        if tenths > self.tenths:
            self.tenths = tenths
            self.console.print(f"{self.what}: {10 * tenths}%", highlight=False)


def run_tool(tool: Callable[[], int]) -> int:
    """Runs a tool's body; a user's mistake becomes one line on stderr and exit status 2."""
    try:
        return tool()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
