"""Which servers belong to a run now: a folder that supervisors of any node write to and the trainer reads.

Every ready server has one file, ``<folder>/<supervisor>.<server>.json``, whose modification time is its heartbeat. The
file appears when the server can generate, is replaced when it was started anew, and goes when it stops or dies; where
nobody is left to remove it (the node is gone), it expires. Ages are measured by the clock of the file system that holds
the folder, so that clocks of nodes need not agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.rollout.discovery import ProcessState, ProcessStatus

HEARTBEAT_S = 2.0
EXPIRY_S = 30.0
"""Above the time for which a busy node or file system may hold a heartbeat up; a dead server refuses connections long
before, and who asks it finds out at once."""
FORMAT = 1
MODEL_FILE = "model.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredServer:
    """One server that a supervisor answers for."""

    id: str
    """``<supervisor>.<server>``: the same as long as its supervisor lives, also over restarts of the server."""
    url: str
    num_ranks: int
    """Engine ranks that join a weight-update group."""
    restarts: int
    """How often the supervisor has started it again. Another number under the same `id` is another process: it holds
    the weights it was started with, whatever it held before, and is in no weight-update group."""
    host: str
    pid: int


def current_servers(folder: Path | str) -> list[RegisteredServer]:
    """The servers that are registered in ``folder`` and alive, ordered by id.

    What a caller may rely on, each time it asks:

    - every entry is whole, was able to generate when it registered, and its heartbeat is younger than `EXPIRY_S`;
    - a server that becomes ready later, on whichever node, is in the answer within about a second of that;
    - one that stops or dies under a living supervisor is out within about a second; one whose node or supervisor is
      gone is out after `EXPIRY_S`;
    - one that died and was started again is back under its `id` with a higher `restarts`, perhaps at another URL;
    - two calls in one process may differ at any moment; nothing here says which weights a server holds.

    A folder that does not exist (yet) has no servers. Reading costs a directory listing and one open per server. The
    caller must be able to write to the folder: a temporary file there tells what time it is for the file system.

    Raises:
        ValueError: a file of the folder is not one that a supervisor wrote; names it.

    Example:
        >>> known = {(server.id, server.restarts) for server in current_servers(folder)}
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    now = _file_system_time(folder)
    found = (_read(path, now) for path in sorted(folder.glob("*.*.json")))
    return [server for server in found if server is not None]


class Registration:
    """A supervisor's side: keeps its ready servers registered while it lives.

    Args:
        folder: shared by all supervisors and the trainer of a run; made where it is missing.

    Attributes:
        name: this supervisor's name in the folder, after its host; no other one has it.
        own_folder: ``<folder>/<name>``, for its logs and its `servers.json`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.own_folder = _claim(folder, _host_name())
        self.name = self.own_folder.name
        self._published: dict[str, RegisteredServer] = {}
        self._last_beat = time.monotonic()

    def publish(self, servers: Sequence[ProcessStatus]) -> None:
        """Registers those that are ready now, takes back all others."""
        ready = {server.id: server for server in map(self._entry, servers) if server is not None}
        for gone in self._published.keys() - ready.keys():
            (self._folder / f"{gone}.json").unlink(missing_ok=True)
        for server in ready.values():
            if self._published.get(server.id) != server:
                _write(self._folder, f"{server.id}.json", {"format": FORMAT, **dataclasses.asdict(server)})
        self._published = ready

    def beat(self) -> None:
        """Renews what is registered; does something only every `HEARTBEAT_S`, so that it can be called often."""
        if time.monotonic() - self._last_beat < HEARTBEAT_S:
            return
        self._last_beat = time.monotonic()
        for server in self._published.values():
            path = self._folder / f"{server.id}.json"
            try:
                os.utime(path)
            except FileNotFoundError:  # somebody cleaned up
                _write(self._folder, path.name, {"format": FORMAT, **dataclasses.asdict(server)})

    def withdraw(self) -> None:
        """Takes everything back."""
        self.publish([])

    def _entry(self, status: ProcessStatus) -> RegisteredServer | None:
        if status.state is not ProcessState.ready or status.pid is None:
            return None
        return RegisteredServer(
            id=f"{self.name}.{status.name}",
            url=status.url,
            num_ranks=status.num_ranks,
            restarts=status.restarts,
            host=socket.gethostname(),
            pid=status.pid,
        )


def publish_model(folder: Path | str, model_path: str | Path) -> None:
    """Tells servers that wait in `published_model` which Hugging Face folder to load.

    Only the start depends on it: the trainer brings every server to its own weights before it asks for rollouts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, MODEL_FILE, {"format": FORMAT, "model_path": str(Path(model_path).resolve())})


def published_model(folder: Path | str) -> str | None:
    """The Hugging Face folder that the trainer of this run works on; None while it has not said."""
    path = Path(folder) / MODEL_FILE
    try:
        fields = json.loads(path.read_text())
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return str(fields["model_path"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be written by megatron_rlvr.train, got {error!r}") from error


def _host_name() -> str:
    """This machine's name as a part of file names."""
    return re.sub(r"[^\w-]+", "_", socket.gethostname())


def _claim(folder: Path, stem: str) -> Path:
    """A new subfolder; making it is what claims its name."""
    own, number = folder / stem, 1
    while True:
        try:
            own.mkdir()
        except FileExistsError:
            number += 1
            own = folder / f"{stem}-{number}"
        else:
            return own


def _write(folder: Path, name: str, fields: dict[str, object]) -> None:
    part = folder / f".{name}.{_host_name()}-{os.getpid()}"
    part.write_text(json.dumps(fields) + "\n")
    part.replace(folder / name)


def _file_system_time(folder: Path) -> float:
    """Unix seconds by the clock that stamps files of the folder."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _read(path: Path, now: float) -> RegisteredServer | None:
    """The entry, or None when it is gone or expired."""
    try:
        # opened first: a network file system then asks its server for the true time of the last heartbeat
        with path.open() as file:
            age_s = now - os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    if age_s > EXPIRY_S:
        return None
    try:
        fields = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return RegisteredServer(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be written by megatron_rlvr.serve, got {error!r}") from error
