"""The file through which a supervisor tells where its servers are and how they fare.

One JSON object, replaced atomically on every change, so that a reader sees a whole state or the one before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

FILE_NAME = "servers.json"
FORMAT = 1


class ProcessState(str, Enum):
    """Life of one supervised process."""

    starting = "starting"
    ready = "ready"
    restarting = "restarting"
    failed = "failed"
    """Given up on, with the reason in `message`."""
    stopped = "stopped"


class FleetState(str, Enum):
    """Life of all servers together."""

    starting = "starting"
    ready = "ready"
    """Every server is ready."""
    degraded = "degraded"
    """Some are restarting or failed."""
    failed = "failed"
    """No server is left, or one never came up at the start."""
    stopped = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessStatus:
    """One server or router."""

    name: str
    url: str
    num_ranks: int
    """Engine ranks that join a weight-update group; 0 for a router."""
    state: ProcessState
    pid: int | None
    restarts: int
    """How often it has been started again; a change means that its weights are the initial ones."""
    log: str
    message: str
    """What it is doing, or why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetStatus:
    """What one supervisor knows."""

    pid: int
    """The supervisor's."""
    host: str
    state: FleetState
    servers: tuple[ProcessStatus, ...]
    router: ProcessStatus | None
    time: float
    """Unix seconds of the last change."""

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def message(self) -> str:
        """Reasons of everything that failed, one a line."""
        everything = [*self.servers, *([self.router] if self.router else [])]
        return "\n".join(each.message for each in everything if each.state is ProcessState.failed)


def new_status(
    *, state: FleetState, servers: tuple[ProcessStatus, ...], router: ProcessStatus | None = None
) -> FleetStatus:
    """A status of this process, now."""
    return FleetStatus(
        pid=os.getpid(), host=socket.gethostname(), state=state, servers=servers, router=router, time=time.time()
    )


def write_status(folder: Path, status: FleetStatus) -> None:
    """Replaces ``folder/servers.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE_NAME}.{os.getpid()}"
    part.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(status)}, indent=1) + "\n")
    part.replace(folder / FILE_NAME)


def forget_status(folder: Path) -> None:
    """Removes what an earlier supervisor wrote."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def read_status(folder: Path) -> FleetStatus | None:
    """The last status written to ``folder``, or None when there is none yet.

    Raises:
        ValueError: the file is not one of this format.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        servers = tuple(_process(entry) for entry in fields.pop("servers"))
        router = fields.pop("router")
        state = FleetState(fields.pop("state"))
        return FleetStatus(**fields, state=state, servers=servers, router=_process(router) if router else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"discovery file {path} must be written by megatron_rlvr.serve, got {error!r}") from error


def _process(entry: dict) -> ProcessStatus:
    return ProcessStatus(**{**entry, "state": ProcessState(entry["state"])})
