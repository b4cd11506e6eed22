"""How cells are run: on this machine one after the other, or as Slurm jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_rlvr.comparison.matrix import Cell
from megatron_rlvr.config.compose import config_dir
from megatron_rlvr.rollout.membership import current_servers

STOP_GRACE_S = 20.0
POLL_S = 0.5


class CellError(RuntimeError):
    """A cell or the server of all cells failed; the message names the log."""


class Launcher(Protocol):
    """Starts cells as processes whose exit status is the cell's."""

    capacity: int
    """Cells that may run at a time."""

    def command(self, cell: Cell, overrides: Sequence[str]) -> list[str]:
        """The command line of a cell; `overrides` are its own and where it writes."""
        ...


class LocalLauncher:
    """One cell at a time on this machine, so that cells do not slow each other down.

    Args:
        ranks: trainer ranks of a cell.
    """

    def __init__(self, ranks: int) -> None:
        if ranks < 1:
            raise ValueError(f"--ranks must be at least 1, got {ranks}")
        self.capacity = 1
        self._ranks = ranks

    def command(self, cell: Cell, overrides: Sequence[str]) -> list[str]:
        train = ["-m", "megatron_rlvr.train", *overrides]
        if self._ranks == 1:
            return [sys.executable, *train]
        launch = ["-m", "megatron_rlvr.launch", "--standalone", "--nproc-per-node", str(self._ranks)]
        return [sys.executable, *launch, *train]


class SlurmLauncher:
    """Every cell a job of its own, submitted and followed by ``slurm/submit.py``. Jobs outlive a stop of this command,
    and the same command takes them up.

    Args:
        cluster: a name of configs/cluster, or the path of a file like those.
        jobs: cells that may wait in the queue or run at a time.

    Raises:
        ValueError: no room for a job, or no submit command (the package is installed without its checkout).
    """

    def __init__(self, cluster: str, *, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {jobs}")
        self.capacity = jobs
        self._cluster = cluster
        self._submit = config_dir().parent / "slurm" / "submit.py"
        if not self._submit.is_file():
            raise ValueError(f"--slurm needs the project's checkout, got none: {self._submit} does not exist")

    def command(self, cell: Cell, overrides: Sequence[str]) -> list[str]:
        # A name of its own: a cell that is asked for again finds its job under way or done, or goes on from its newest
        # checkpoint.
        named = [f"cluster={self._cluster}", f"run_name=cell-{cell.fingerprint}"]
        return [sys.executable, str(self._submit), "--follow", *named, *overrides]


class CellProcess:
    """A running cell, with its output in a log."""

    def __init__(self, cell: Cell, command: Sequence[str], log: Path) -> None:
        self.cell = cell
        self.log = log
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal is this command's to pass on.
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to end, and makes it after `STOP_GRACE_S`; its own children end with it."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def tail(self, lines: int = 15) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class SharedServer:
    """One SGLang server (or as many as the configuration says) that all cells use, each syncing its own weights to it.

    Saves every cell the start of a server. Possible where all cells share one model shape.

    Args:
        overrides: of any cell, for its server settings.
        model_path: Hugging Face folder of that shape.
        num_servers: how many the settings ask for.
        folder: a new folder, for logs and for the servers to register in.
    """

    def __init__(self, overrides: Sequence[str], *, model_path: Path, num_servers: int, folder: Path) -> None:
        self._overrides = [
            *(one for one in overrides if not one.startswith("rollout.discovery=")),
            f"model.path={model_path.resolve()}",
            f"rollout.discovery={folder.resolve()}",
        ]
        self._num_servers = num_servers
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float) -> list[str]:
        """Starts it and waits until it answers; returns the servers' URLs.

        Raises:
            CellError: it failed or took longer than `timeout_s` seconds.
        """
        self._folder.mkdir(parents=True)
        with (self._folder / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rlvr.serve", *self._overrides],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.alive:
            servers = current_servers(self._folder)
            if len(servers) == self._num_servers:
                return [server.url for server in servers]
            time.sleep(POLL_S)
        reason = "ended" if not self.alive else f"was not ready within {timeout_s:g} s"
        self.stop()
        raise CellError(f"the server of all cells {reason}; log {self._folder / 'serve.log'}")

    def stop(self) -> None:
        """Ends it with all its children; safe to call twice."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
        if self._process.poll() is None:
            # A second signal kills the servers without grace.
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
