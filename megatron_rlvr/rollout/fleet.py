"""All SGLang servers of one supervisor, with the router before them."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlvr.config.schema import DType, ServerConfig
from megatron_rlvr.rollout import arguments
from megatron_rlvr.rollout.api_key import check_listening
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus, ProcessState, new_status, write_status
from megatron_rlvr.rollout.membership import Registration
from megatron_rlvr.rollout.process import ServerProcess

STOP_GRACE_S = 20.0
"""SGLang looks for a SIGTERM every 5 s, then lets its schedulers release the GPU."""
CPU_STOP_GRACE_S = 0.5
"""Without a GPU there is nothing to release."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetSpec:
    """What to serve, and where to keep logs and the discovery file."""

    server: ServerConfig
    model_path: str
    dtype: DType
    gpu: bool
    folder: Path
    api_key_file: str | None = None
    """File with the key that servers want."""

    def __post_init__(self) -> None:
        arguments.check_server(self.server, gpu=self.gpu)
        check_listening(self.server.host, self.api_key_file)
        if not (Path(self.model_path) / "config.json").is_file():
            raise ValueError(f"model.path must be a folder with a config.json, got {self.model_path!r}")

    def to_json(self) -> str:
        server = dataclasses.asdict(self.server)
        server["dtype"] = self.server.dtype.value if self.server.dtype else None
        fields: dict[str, Any] = {"server": server, "model_path": self.model_path, "dtype": self.dtype.value}
        fields |= {"gpu": self.gpu, "folder": str(self.folder), "api_key_file": self.api_key_file}
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> FleetSpec:
        fields = json.loads(text)
        server = fields["server"]
        server["dtype"] = DType(server["dtype"]) if server["dtype"] else None
        return cls(
            server=ServerConfig(**server),
            model_path=fields["model_path"],
            dtype=DType(fields["dtype"]),
            gpu=fields["gpu"],
            folder=Path(fields["folder"]),
            api_key_file=fields["api_key_file"],
        )


class ServerFleet:
    """``num_servers * dp`` supervised servers; its state is in the discovery file after every change.

    Args:
        spec: what to serve.
        registration: where trainers on other nodes find the servers; None when only the parent needs to know.

    Example:
        >>> fleet = ServerFleet(spec)
        >>> fleet.run(stop)   # until the event is set, or nothing is left to serve
    """

    def __init__(self, spec: FleetSpec, registration: Registration | None = None) -> None:
        self._spec = spec
        self._registration = registration
        self._changed = threading.Event()
        self._been_ready = False
        self.servers = [self._server(index) for index in range(spec.server.num_servers * spec.server.dp)]
        self.router: ServerProcess | None = None

    def run(self, stop: threading.Event, *, hurry: threading.Event) -> FleetStatus:
        """Serves until ``stop`` is set or the fleet has failed, then stops everything; the last status.

        Args:
            stop: set to end.
            hurry: once set, processes are killed without grace.
        """
        for server in self.servers:
            server.start()
        status = self._write()
        while not stop.is_set() and status.state is not FleetState.failed:
            if self._changed.wait(0.1):
                self._changed.clear()
                self._start_router()
                status = self._write()
            if self._registration is not None:
                self._registration.beat()
        if self._registration is not None:
            self._registration.withdraw()  # nobody shall begin to use what is about to stop
        self._stop(hurry)
        return self._write(status.state if status.state is FleetState.failed else FleetState.stopped)

    def _stop(self, hurry: threading.Event) -> None:
        everything = [*self.servers, *([self.router] if self.router else [])]
        grace_s = STOP_GRACE_S if self._spec.gpu else CPU_STOP_GRACE_S
        stoppers = [threading.Thread(target=partial(each.stop, grace_s=grace_s, hurry=hurry)) for each in everything]
        for thread in stoppers:
            thread.start()
        for thread in stoppers:
            thread.join()

    def _server(self, index: int) -> ServerProcess:
        spec, config = self._spec, self._spec.server
        cores = sorted(os.sched_getaffinity(0))
        return ServerProcess(
            name=f"server-{index}",
            command=lambda port: arguments.server_arguments(
                config,
                model_path=spec.model_path,
                dtype=config.dtype or spec.dtype,
                port=port,
                index=index,
                gpu=spec.gpu,
                parent_pid=os.getpid(),
                api_key_file=spec.api_key_file,
            ),
            environment=arguments.server_environment(
                os.environ, tp=config.tp, num_engines=config.num_servers * config.dp, gpu=spec.gpu, cores=cores
            ),
            bind_host=config.host,
            url_host=_reachable(config.host),
            num_ranks=config.tp,
            health_path="/health_generate",
            folder=spec.folder,
            startup_timeout_s=config.startup_timeout_s,
            max_restarts=config.max_restarts,
            on_change=self._changed.set,
        )

    def _start_router(self) -> None:
        ready = all(server.status.state is ProcessState.ready for server in self.servers)
        if not self._spec.server.router or self.router is not None or not ready:
            return
        config = self._spec.server
        urls = [server.status.url for server in self.servers]
        self.router = ServerProcess(
            name="router",
            command=lambda port: arguments.router_arguments(
                host=config.host,
                port=port,
                worker_urls=urls,
                parent_pid=os.getpid(),
                api_key_file=self._spec.api_key_file,
            ),
            environment=dict(os.environ),
            bind_host=config.host,
            url_host=_reachable(config.host),
            num_ranks=0,
            health_path="/readiness",
            folder=self._spec.folder,
            startup_timeout_s=config.startup_timeout_s,
            max_restarts=config.max_restarts,
            on_change=self._changed.set,
        )
        self.router.start()

    def _write(self, state: FleetState | None = None) -> FleetStatus:
        servers = tuple(server.status for server in self.servers)
        router = self.router.status if self.router is not None else None
        status = new_status(state=state or self._state(), servers=servers, router=router)
        if self._registration is not None and status.state is not FleetState.stopped:
            self._registration.publish(servers)
        write_status(self._spec.folder, status)
        return status

    def _state(self) -> FleetState:
        states = [server.status.state for server in self.servers]
        wanted = len(states) + int(self._spec.server.router)
        if self.router is not None:
            states.append(self.router.status.state)
        if len(states) == wanted and all(state is ProcessState.ready for state in states):
            self._been_ready = True
            return FleetState.ready
        failed = [state is ProcessState.failed for state in states[: len(self.servers)]]
        if (not self._been_ready and ProcessState.failed in states) or all(failed):
            return FleetState.failed
        return FleetState.degraded if self._been_ready else FleetState.starting


def _reachable(host: str) -> str:
    """How other machines name a bind address."""
    return socket.getfqdn() if host in ("0.0.0.0", "::") else host
