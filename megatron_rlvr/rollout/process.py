"""One supervised process that answers HTTP: started, waited for, restarted when it dies, stopped with its children."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rlvr.rollout import lifetime, wire
from megatron_rlvr.rollout.discovery import ProcessState, ProcessStatus
from megatron_rlvr.rollout.ports import free_port

HEALTH_POLL_S = 0.25
HEALTH_TIMEOUT_S = 30.0
"""A first token on a loaded machine takes seconds."""
LOG_TAIL_LINES = 20
SHARED_POLL_S = 10.0
PORT_TAKEN = "address already in use"


class ServerProcess:
    """A process with a port, a log and a thread that keeps it alive.

    A first start that fails is final (its arguments are wrong, or it lacks memory); a process that has been healthy
    and dies is started again, at most ``max_restarts`` times in all, on the same port unless someone else took it.

    Args:
        name: for messages and the log's file name.
        command: argv for a given port.
        environment: of the process.
        bind_host: where the port must be free.
        url_host: how others reach it.
        num_ranks: engine ranks, for the status.
        health_path: answers 200 once it serves.
        folder: its log goes to ``<folder>/<name>.log``.
        startup_timeout_s: seconds from the start to the first healthy answer.
        max_restarts: bound on restarts.
        on_change: called, from its thread, after every change of `status`.
    """

    def __init__(
        self,
        *,
        name: str,
        command: Callable[[int], list[str]],
        environment: Mapping[str, str],
        bind_host: str,
        url_host: str,
        num_ranks: int,
        health_path: str,
        folder: Path,
        startup_timeout_s: float,
        max_restarts: int,
        on_change: Callable[[], None],
    ) -> None:
        self._command, self._environment = command, environment
        self._bind_host, self._url_host = bind_host, url_host
        self._health_path, self._startup_timeout_s, self._max_restarts = health_path, startup_timeout_s, max_restarts
        self._on_change = on_change
        self._log = folder / f"{name}.log"
        self._port = free_port(bind_host)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._shared: set[Path] = set()
        self._thread = threading.Thread(target=self._keep_alive, name=name, daemon=True)
        self.status = ProcessStatus(
            name=name,
            url=self._url(),
            num_ranks=num_ranks,
            state=ProcessState.starting,
            pid=None,
            restarts=0,
            log=str(self._log),
            message="starting",
        )

    def start(self) -> None:
        """Begins in the background; `status` tells how it goes."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self, *, grace_s: float, hurry: threading.Event) -> None:
        """Ends it and everything it started; safe to call twice.

        Args:
            grace_s: seconds from SIGTERM to SIGKILL.
            hurry: once set, SIGKILL follows at once.
        """
        with self._lock:
            self._stopping.set()
            if self._process is not None and self._process.poll() is None:
                self._shared |= lifetime.shared_files(self._process.pid)
                self._process.terminate()
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + grace_s
        while self._thread.is_alive() and time.monotonic() < deadline and not hurry.is_set():
            self._thread.join(0.05)
        with self._lock:
            if self._process is not None:
                lifetime.kill_group(self._process, shared=self._shared)
        self._thread.join()

    def _url(self) -> str:
        host = f"[{self._url_host}]" if ":" in self._url_host else self._url_host
        return f"http://{host}:{self._port}"

    def _set(self, state: ProcessState, message: str, **fields: Any) -> None:
        self.status = replace(self.status, state=state, message=message, url=self._url(), **fields)
        self._on_change()

    def _keep_alive(self) -> None:
        been_healthy = False
        while (process := self._spawn()) is not None:
            failure = self._wait_healthy(process)
            if failure is None:
                been_healthy = True
                self._set(ProcessState.ready, "ready")
                self._wait_end(process)
                failure = f"ended while serving, {_describe_exit(process.returncode)}"
            tail = self.log_tail()
            lifetime.kill_group(process, shared=self._shared)
            if self._stopping.is_set():
                break
            if PORT_TAKEN in tail.lower():
                self._port = free_port(self._bind_host)  # someone was faster
                if not been_healthy:
                    continue
            failure = f"{self.status.name} (pid {process.pid}) {failure}; log {self._log}:\n{tail}"
            if not been_healthy:
                self._set(ProcessState.failed, failure, pid=None)
                return
            if self.status.restarts >= self._max_restarts:
                self._set(ProcessState.failed, f"gave up after {self.status.restarts} restarts: {failure}", pid=None)
                return
            self._set(ProcessState.restarting, failure, pid=None, restarts=self.status.restarts + 1)
        self._set(ProcessState.stopped, "stopped", pid=None)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            with self._log.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    self._command(self._port),
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            process = self._process
        self._set(self.status.state, self.status.message, pid=process.pid)
        return process

    def _wait_end(self, process: subprocess.Popen[bytes]) -> None:
        """Waits, and notes what the process shares while there is something to be seen of it."""
        while process.poll() is None:
            try:
                process.wait(timeout=SHARED_POLL_S)
            except subprocess.TimeoutExpired:
                self._shared |= lifetime.shared_files(process.pid)

    def _wait_healthy(self, process: subprocess.Popen[bytes]) -> str | None:
        """None when healthy, else what went wrong."""
        deadline = time.monotonic() + self._startup_timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return f"ended before it was healthy, {_describe_exit(process.returncode)}"
            try:
                status, _ = wire.request(self.status.url, "GET", self._health_path, timeout_s=HEALTH_TIMEOUT_S)
                if status == 200 and process.poll() is None:
                    # before anyone learns that it is ready: from then on it may be killed with nothing left to see
                    self._shared |= lifetime.shared_files(process.pid)
                    return None
            except wire.WireError:
                pass  # not listening yet
            if self._stopping.wait(HEALTH_POLL_S):
                process.wait()
                return "was stopped"
        return f"was not healthy within {self._startup_timeout_s:g} s (rollout.server.startup_timeout_s)"

    def log_tail(self) -> str:
        """Last lines written since the latest start."""
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - 16384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _describe_exit(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
