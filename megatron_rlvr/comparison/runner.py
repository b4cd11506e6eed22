"""Runs the cells that are not finished yet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.comparison.cells import (
    CellRecord,
    finished,
    log_path,
    record_path,
    run_root,
    steps_done,
    write_record,
)
from megatron_rlvr.comparison.launch import POLL_S, CellError, CellProcess, Launcher, SharedServer
from megatron_rlvr.comparison.matrix import Cell, Matrix
from megatron_rlvr.trainer.warm_cache import WarmCacheEntry, cache_key

SERVER_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the comparison is."""

    done: int
    total: int
    running: str
    """Cells under way, with their steps."""


class Runner:
    """Runs a matrix, cell after cell; what is finished is not run again.

    Args:
        matrix: what to run.
        out: the comparison's folder.
        launcher: how a cell is run.
        share_server: let all cells use one server, once there is a start to serve.
        note: gets a line for everything that happened.
        progress: gets the state a few times a second.
    """

    def __init__(
        self,
        matrix: Matrix,
        out: Path,
        launcher: Launcher,
        *,
        share_server: bool,
        note: Callable[[str], None],
        progress: Callable[[Progress], None],
    ) -> None:
        self._cells = matrix.cells()
        self._out = out
        self._launcher = launcher
        self._share = share_server
        self._note, self._progress = note, progress
        self._server: SharedServer | None = None
        self._urls: list[str] = []
        self._running: dict[str, tuple[CellProcess, bool]] = {}

    def run(self) -> list[str]:
        """Runs what is missing, to the end; the names of cells that failed."""
        waiting = [cell for cell in self._cells if finished(self._out, cell) is None]
        done = len(self._cells) - len(waiting)
        if done:
            self._note(f"{done} of {len(self._cells)} cells are finished already")
        failed: list[str] = []
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._launcher.capacity and not self._blocked(waiting[0]):
                    self._begin(waiting.pop(0))
                time.sleep(POLL_S)
                failed += self._reap()
                self._report(len(self._cells) - len(waiting) - len(self._running) - len(failed))
        finally:
            for process, _ in self._running.values():
                process.stop()
            if self._server is not None:
                self._server.stop()
        return failed

    def _blocked(self, cell: Cell) -> bool:
        """Whether another cell is making the start that this one needs: two at once would make it twice."""
        making = any(makes and process.cell.seed == cell.seed for process, makes in self._running.values())
        return making and start_of(cell) is None

    def _begin(self, cell: Cell) -> None:
        start = start_of(cell)
        record_path(self._out, cell).unlink(missing_ok=True)
        urls = self._shared_urls(cell, start)
        overrides = [*cell.overrides, f"output_dir={run_root(self._out, cell)}"]
        if urls:
            overrides.append(f"rollout.urls=[{','.join(urls)}]")
        process = CellProcess(cell, self._launcher.command(cell, overrides), log_path(self._out, cell))
        self._running[cell.name] = (process, start is None)

    def _shared_urls(self, cell: Cell, start: Path | None) -> list[str]:
        """URLs of the server of all cells, started now if there is something to serve; empty where a cell needs its
        own. The very first cell may have to make the start with a server of its own."""
        if not self._share:
            return []
        if self._server is not None and self._server.alive:
            return self._urls
        starts = [start, *(start_of(other) for other in self._cells)]
        folder = next((path for path in starts if path is not None), None)
        if folder is None:
            return []
        settings = cell.config().rollout.server
        self._server = SharedServer(
            cell.overrides,
            model_path=folder,
            num_servers=settings.num_servers * settings.dp,
            folder=self._out / "servers" / time.strftime(f"%Y-%m-%d_%H-%M-%S-{os.getpid()}"),
        )
        started = time.monotonic()
        self._urls = self._server.start(SERVER_TIMEOUT_S)
        self._note(f"one server for all cells, {time.monotonic() - started:.0f} s: {', '.join(self._urls)}")
        return self._urls

    def _reap(self) -> list[str]:
        """Takes in cells that have ended; names of those that failed."""
        failed = []
        for name, (process, makes_start) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            wall_s = time.monotonic() - process.started
            process.stop()
            if code == 0:
                self._keep(process.cell, wall_s, makes_start)
                self._note(f"{name}: finished in {wall_s:.0f} s")
                continue
            failed.append(name)
            self._note(f"{name}: failed with exit status {code}, log {process.log}:\n{process.tail()}")
            if self._server is not None:
                # A run that ended in the middle may have left a half-made weight-update group there.
                self._server.stop()
                self._server = None
        return failed

    def _keep(self, cell: Cell, wall_s: float, made_start: bool) -> None:
        latest = run_root(self._out, cell) / "latest"
        write_record(
            self._out,
            cell,
            CellRecord(
                method=cell.method.name,
                seed=cell.seed,
                fingerprint=cell.fingerprint,
                overrides=list(cell.overrides),
                run_dir=str(latest.resolve().relative_to(self._out.resolve())),
                wall_s=round(wall_s, 1),
                shared_server=self._server is not None,
                made_start=made_start,
            ),
        )

    def _report(self, done: int) -> None:
        running = ", ".join(
            f"{name} {steps_done(self._out, process.cell)} steps" for name, (process, _) in self._running.items()
        )
        self._progress(Progress(done=done, total=len(self._cells), running=running))


def start_of(cell: Cell) -> Path | None:
    """The Hugging Face folder that the cell's training starts from, None while the warm start is not made yet."""
    config = cell.config()
    if not config.warm_start.enabled:
        return Path(config.model.path) if config.model.path is not None else None
    return WarmCacheEntry(Path(config.warm_start.cache_dir) / cache_key(config)).finished


def check_starts(cells: Sequence[Cell]) -> None:
    """Every method of a seed starts from the same weights.

    Raises:
        ValueError: two methods of a seed differ in the start.
    """
    starts: dict[int, tuple[str, str]] = {}
    for cell in cells:
        config = cell.config()
        key = cache_key(config) if config.warm_start.enabled else str(config.model.path)
        first = starts.setdefault(cell.seed, (cell.name, key))
        if first[1] != key:
            raise ValueError(
                f"methods of one seed must start from the same model, but {cell.name} and {first[0]} differ in model, "
                "data or warm start"
            )


__all__ = ["CellError", "Progress", "Runner", "check_starts", "start_of"]
