"""One supervised process, with small scripts as servers; free ports; HTTP with a deadline."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.rollout import lifetime, ports, process, wire
from megatron_rlvr.rollout.discovery import ProcessState, ProcessStatus
from megatron_rlvr.rollout.process import ServerProcess
from tests.fakes.sglang_server import FakeSGLang, Fault

SERVE = """
import http.server, sys
print("on port", sys.argv[1], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


class Observed:
    """Collects the states a process goes through."""

    def __init__(self, folder: Path, script: str, **changes: Any) -> None:
        self.states: list[ProcessStatus] = []
        self._changed = threading.Condition()
        options: dict[str, Any] = {
            "name": "thing",
            "command": lambda port: [sys.executable, "-c", script, str(port)],
            "environment": dict(os.environ),
            "bind_host": "127.0.0.1",
            "url_host": "127.0.0.1",
            "num_ranks": 1,
            "health_path": "/",
            "folder": folder,
            "startup_timeout_s": 60.0,
            "max_restarts": 2,
            "on_change": self._note,
        }
        self.process = ServerProcess(**{**options, **changes})
        self.hurry = threading.Event()

    def _note(self) -> None:
        with self._changed:
            self.states.append(self.process.status)
            self._changed.notify_all()

    def wait(self, state: ProcessState, *, restarts: int = 0) -> ProcessStatus:
        def reached() -> ProcessStatus | None:
            return next((s for s in self.states if s.state is state and s.restarts == restarts), None)

        with self._changed:
            assert self._changed.wait_for(reached, timeout=60.0), self.states
            found = reached()
            assert found is not None
            return found

    def stop(self, grace_s: float = 5.0) -> None:
        self.process.stop(grace_s=grace_s, hurry=self.hurry)


@pytest.fixture
def observe(tmp_path: Path) -> Iterator[Callable[..., Observed]]:
    made: list[Observed] = []

    def make(script: str, *, start: bool = True, **changes: Any) -> Observed:
        made.append(Observed(tmp_path, script, **changes))
        if start:
            made[-1].process.start()
        return made[-1]

    yield make
    for observed in made:
        observed.stop(0.0)


def test_goes_through_its_states(observe: Callable[..., Observed], tmp_path: Path) -> None:
    observed = observe(SERVE)
    ready = observed.wait(ProcessState.ready)
    assert wire.request(ready.url, "GET", "/", timeout_s=10.0)[0] == 200
    assert f"on port {ready.url.rpartition(':')[2]}" in (tmp_path / "thing.log").read_text()
    observed.stop()
    observed.stop()
    assert [s.state.value for s in observed.states] == ["starting", "ready", "stopped"]
    assert observed.states[-1].pid is None
    assert list(lifetime.group_members(ready.pid or 0)) == []


def test_restarts_are_counted_and_bounded(observe: Callable[..., Observed]) -> None:
    dying = SERVE.replace("serve_forever()", "handle_request()")  # ends after its first health check
    observed = observe(dying)
    failed = observed.wait(ProcessState.failed, restarts=2)
    assert "gave up after 2 restarts" in failed.message
    assert "ended while serving, exit code 0" in failed.message
    assert [s.restarts for s in observed.states if s.state is ProcessState.ready] == [0, 1, 2]
    assert len({s.url for s in observed.states}) == 1


def test_killed_the_moment_it_is_ready_leaves_no_shared_memory(observe: Callable[..., Observed]) -> None:
    sharing = """
import mmap, os
from pathlib import Path
shared = Path(f"/dev/shm/sglang_loads_{os.getpid()}_test.shm")
shared.write_bytes(bytes(4096))
mapped = mmap.mmap(os.open(shared, os.O_RDWR), 4096)
"""
    killed: list[int] = []

    def kill_when_ready() -> None:
        status = observed.process.status
        if status.state is ProcessState.ready and status.pid is not None:
            killed.append(status.pid)
            os.kill(status.pid, signal.SIGKILL)
            os.waitid(os.P_PID, status.pid, os.WEXITED | os.WNOWAIT)  # dead before its owner looks again
        observed._note()

    observed = observe(sharing + SERVE, max_restarts=0, start=False, on_change=kill_when_ready)
    observed.process.start()
    observed.wait(ProcessState.failed)
    assert len(killed) == 1
    assert not list(Path("/dev/shm").glob(f"sglang_loads_{killed[0]}_*"))


def test_port_taken_meanwhile_is_given_up(observe: Callable[..., Observed], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        offered = iter([port, ports.free_port("127.0.0.1")])
        monkeypatch.setattr(process, "free_port", lambda host: next(offered))
        observed = observe(SERVE)
        ready = observed.wait(ProcessState.ready)
    assert ready.url != f"http://127.0.0.1:{port}"
    assert ready.restarts == 0


def test_hurry_cuts_the_grace_short(observe: Callable[..., Observed]) -> None:
    observed = observe("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVE)
    ready = observed.wait(ProcessState.ready)
    observed.hurry.set()
    observed.stop(grace_s=3600.0)
    assert list(lifetime.group_members(ready.pid or 0)) == []


def test_stop_before_it_is_healthy(observe: Callable[..., Observed]) -> None:
    observed = observe("import time; time.sleep(3600)")
    observed.wait(ProcessState.starting)
    observed.stop()
    assert observed.states[-1].state is ProcessState.stopped


def test_children_that_outlive_their_parent_are_swept(observe: Callable[..., Observed]) -> None:
    leaving = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    observed = observe(leaving)
    failed = observed.wait(ProcessState.failed)
    group = next(s.pid for s in observed.states if s.pid is not None)
    assert list(lifetime.group_members(group)) == []
    assert "ended before it was healthy, exit code 0" in failed.message


def test_free_ports_lie_below_the_ephemeral_range_and_are_free() -> None:
    port = ports.free_port("127.0.0.1")
    assert ports.LOWEST <= port <= ports.HIGHEST < 32768
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_port_on_a_foreign_address_is_an_error() -> None:
    with pytest.raises(OSError, match=r"no free port between 20000 and 32000 on 192\.0\.2\.1"):
        ports.free_port("192.0.2.1")


def test_wire_ignores_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeSGLang() as server:
        assert wire.request(server.url, "GET", "/health", timeout_s=5.0) == (200, b"")
        server.fault("health", Fault.slow, delay_s=30.0)
        with pytest.raises(wire.WireError, match=f"GET {server.url}/health: no answer within 0.2 s"):
            wire.request(server.url, "GET", "/health", timeout_s=0.2)
