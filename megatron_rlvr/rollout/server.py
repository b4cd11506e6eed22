"""The trainer's side of its servers: local ones under a supervisor of their own, or others that are only asked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_rlvr.config.schema import DType, RolloutConfig
from megatron_rlvr.rollout import lifetime
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus, ProcessState, forget_status, read_status
from megatron_rlvr.rollout.engine import ServerInfo, probe
from megatron_rlvr.rollout.fleet import STOP_GRACE_S, FleetSpec
from megatron_rlvr.rollout.membership import current_servers, publish_model
from megatron_rlvr.rollout.platform import gpu_available
from megatron_rlvr.types import EngineAddress, EngineError

PROBE_TIMEOUT_S = 5.0
POLL_S = 0.1
PROGRESS_EVERY_S = 1.0
REGISTRATION_POLL_S = 0.5
"""Lists a folder that may lie on a network file system."""

__all__ = ["LocalServers", "ServerInfo", "ServerStartError"]


class ServerStartError(RuntimeError):
    """Servers did not come up, or given ones do not answer."""


class LocalServers:
    """SGLang servers of one run: local ones, unless ``rollout.urls`` names others or ``rollout.discovery`` the folder
    where others register. Those are neither started nor stopped here.

    Local servers start in the background under a supervisor process, which restarts them when they die and ends them
    when the trainer ends, however it ends.

    Args:
        config: the rollout group.
        model_path: Hugging Face folder that the servers load.
        dtype: of weights and computation.
        run_dir: logs and the discovery file go to ``<run_dir>/servers``.

    Raises:
        ValueError: a setting that no server could start with.

    Example:
        >>> servers = LocalServers(config.rollout, model_path=path, dtype=DType.bf16, run_dir=run_dir)
        >>> infos = servers.wait_ready(print)
        >>> servers.stop()
    """

    def __init__(self, config: RolloutConfig, *, model_path: str | Path, dtype: DType, run_dir: Path) -> None:
        self.router_url = config.router_url
        """Router before the servers, if any; of local servers known once they are ready."""
        self._config = config
        self._folder = run_dir.resolve() / "servers"
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._given: list[ServerInfo] = []
        if config.urls:
            return
        if config.discovery is not None:
            publish_model(config.discovery, model_path)
            return
        if config.router_url is not None:
            raise ValueError(
                f"rollout.router_url must be null without rollout.urls (rollout.server.router=true starts a router), "
                f"got {config.router_url!r}"
            )
        spec = FleetSpec(
            server=config.server,
            model_path=str(Path(model_path).resolve()),
            dtype=config.server.dtype or dtype,
            gpu=gpu_available(),
            folder=self._folder,
            api_key_file=config.api_key_file and str(Path(config.api_key_file).resolve()),
        )
        self._start(spec)

    def wait_ready(self, on_progress: Callable[[str], None]) -> list[ServerInfo]:
        """Blocks until all servers answer.

        Args:
            on_progress: called about once a second with a line on what is being waited for.

        Returns:
            One entry a server, in a fixed order.

        Raises:
            ServerStartError: a server failed (with the end of its log), a given URL does not answer, or too few
                servers registered in time.
        """
        if self._config.discovery is not None:
            return self._wait_registered(self._config.discovery, on_progress)
        if self._supervisor is None:
            urls = self._config.urls
            on_progress(f"asking {', '.join(urls)}")
            self._given = _probe_all(urls)
            return self._given
        started, last = time.monotonic(), 0.0
        while True:
            # in this order: a status written just before the end is not missed
            ended = self._supervisor.poll() is not None
            status = self.status()
            if status is not None and status.state in (FleetState.ready, FleetState.degraded):
                self.router_url = status.router.url if status.router is not None else None
                return _probe_all(status.urls)
            if ended or (status is not None and status.state is FleetState.failed):
                raise ServerStartError(self._failure(status))
            waited = time.monotonic() - started
            if waited - last >= PROGRESS_EVERY_S:
                last = waited
                on_progress(_describe(status, waited))
            time.sleep(POLL_S)

    def _wait_registered(self, folder: str, on_progress: Callable[[str], None]) -> list[ServerInfo]:
        wanted, patience_s = self._config.min_servers, self._config.server.startup_timeout_s
        started, last = time.monotonic(), 0.0
        while len(registered := current_servers(folder)) < wanted:
            waited = time.monotonic() - started
            news = f"{len(registered)} of {wanted} servers have registered in {folder}"
            if waited > patience_s:
                raise ServerStartError(f"{news} within {patience_s:g} s (rollout.server.startup_timeout_s)")
            if waited - last >= PROGRESS_EVERY_S:
                last = waited
                on_progress(f"{news} ({waited:.0f} s)")
            time.sleep(REGISTRATION_POLL_S)
        return _probe_all([server.url for server in registered])

    def listed(self) -> list[EngineAddress]:
        """The servers that are registered and able to generate now; those of ``rollout.urls`` always.

        Raises:
            ServerStartError: local servers, all of which their supervisor has given up on.
        """
        if self._config.discovery is not None:
            return [
                EngineAddress(id=server.id, url=server.url, num_ranks=server.num_ranks, restarts=server.restarts)
                for server in current_servers(self._config.discovery)
            ]
        if self._supervisor is None:
            return [info.address for info in self._given]
        ended = self._supervisor.poll() is not None
        status = self.status()
        if ended or status is None or status.state is FleetState.failed:
            raise ServerStartError(self._failure(status))
        return [
            EngineAddress(id=server.name, url=server.url, num_ranks=server.num_ranks, restarts=server.restarts)
            for server in status.servers
            if server.state is ProcessState.ready
        ]

    def status(self) -> FleetStatus | None:
        """What the supervisor last wrote; None for given servers, or before it wrote anything."""
        return read_status(self._folder) if self._supervisor is not None else None

    def check(self) -> None:
        """Whether there may still be servers; for calling again and again.

        Raises:
            ServerStartError: local servers are given up, or their supervisor is gone; with the end of the log.
        """
        if self._supervisor is None:
            return
        ended = self._supervisor.poll() is not None
        status = self.status()
        if ended or (status is not None and status.state is FleetState.failed):
            raise ServerStartError(self._failure(status))

    def end_at(self, url: str) -> None:
        """Ends a local server that hangs, so that its supervisor starts it again; others are not ours to end."""
        status = self.status()
        for server in status.servers if status is not None else ():
            if server.url == url and server.state is ProcessState.ready and server.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends local servers with all their children, and the supervisor; safe to call twice."""
        if self._supervisor is None:
            return
        if self._supervisor.poll() is None:
            self._supervisor.terminate()
            try:
                self._supervisor.wait(timeout=STOP_GRACE_S + 10.0)
            except subprocess.TimeoutExpired:
                pass  # its servers end themselves once it is gone
        lifetime.kill_group(self._supervisor)

    def _start(self, spec: FleetSpec) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        forget_status(self._folder)
        spec_path = self._folder / "spec.json"
        spec_path.write_text(spec.to_json())
        argv = [sys.executable, "-m", "megatron_rlvr.rollout.supervisor", "--parent-pid", str(os.getpid())]
        with (self._folder / "supervisor.log").open("ab") as log:
            self._supervisor = subprocess.Popen(
                [*argv, str(spec_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # a Ctrl-C at the terminal is the trainer's to handle
                start_new_session=True,
            )

    def _failure(self, status: FleetStatus | None) -> str:
        if status is not None and status.message:
            return status.message
        log = self._folder / "supervisor.log"
        return f"the servers' supervisor ended; log {log}:\n{log.read_text(errors='replace')[-4000:]}"


def _probe_all(urls: list[str]) -> list[ServerInfo]:
    with ThreadPoolExecutor(len(urls)) as threads:
        answers = [threads.submit(partial(probe, url, timeout_s=PROBE_TIMEOUT_S)) for url in urls]
    infos = []
    for url, answer in zip(urls, answers, strict=True):
        try:
            infos.append(answer.result())
        except EngineError as error:
            raise ServerStartError(f"server {url} does not answer as one: {error}") from error
    return infos


def _describe(status: FleetStatus | None, waited_s: float) -> str:
    if status is None:
        return f"supervisor starting ({waited_s:.0f} s)"
    waiting = [server for server in status.servers if server.state is not ProcessState.ready]
    if not waiting:
        return f"router starting ({waited_s:.0f} s)"
    ready = len(status.servers) - len(waiting)
    return f"{ready}/{len(status.servers)} servers ready ({waited_s:.0f} s){_last_line(Path(waiting[0].log))}"


def _last_line(log: Path) -> str:
    """The end of a log, short, for a progress line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2048))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    return f": {lines[-1].strip()[:100]}" if lines else ""
