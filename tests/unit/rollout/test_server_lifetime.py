"""Servers start, are restarted, stop, and never survive their trainer. The supervisor, launcher and processes are real;
the sglang package that the launcher imports is `tests/fakes/sglang_package`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
from megatron_rlvr.rollout import lifetime, wire
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus, ProcessState, read_status
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.membership import current_servers
from megatron_rlvr.rollout.router_workers import use_workers, worker_urls
from megatron_rlvr.rollout.server import LocalServers, ServerStartError
from megatron_rlvr.types import EngineError

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 90.0


@pytest.fixture(autouse=True)
def _fake_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests/fakes/sglang_package'}:{ROOT}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., LocalServers]]:
    """Starts local servers; they are stopped at the end."""
    started: list[LocalServers] = []

    def start(**server: Any) -> LocalServers:
        config = RolloutConfig(server=ServerConfig(**server))
        servers = LocalServers(config, model_path=model, dtype=DType.fp32, run_dir=tmp_path)
        started.append(servers)
        return servers

    yield start
    for servers in started:
        servers.stop()


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_S:g} s: {what}")


def status_of(servers: LocalServers) -> FleetStatus:
    status = servers.status()
    assert status is not None
    return status


def leaders(status: FleetStatus) -> list[int]:
    """Process groups of the servers; each leader's pid is its group."""
    return [server.pid for server in status.servers if server.pid is not None]


def assert_nothing_left(groups: list[int]) -> None:
    for group in groups:
        wait_until(lambda group=group: not list(lifetime.group_members(group)), f"end of process group {group}")
        wait_until(lambda group=group: not lifetime.scratch_folder(group).exists(), "removal of the scratch folder")
        assert not list(Path("/dev/shm").glob(f"sglang_loads_{group}_*"))


def test_servers_start_report_and_stop_without_trace(start: Callable[..., LocalServers], model: Path) -> None:
    lines: list[str] = []
    servers = start(num_servers=1, dp=2, tp=2)
    infos = servers.wait_ready(lines.append)
    assert len({info.url for info in infos}) == 2
    assert [(info.num_ranks, info.model_path, info.weight_version) for info in infos] == [(2, str(model), "0")] * 2
    assert any("servers ready (" in line for line in lines)
    status = status_of(servers)
    assert status.state is FleetState.ready
    assert status.urls == [info.url for info in infos]
    groups = leaders(status)
    assert all(len(list(lifetime.group_members(group))) >= 2 for group in groups)
    for server in status.servers:
        child = json.loads(next(line for line in Path(server.log).read_text().splitlines() if "child" in line)[6:])
        assert child["launcher_ran"], "stand-ins must reach the processes that SGLang spawns"
    servers.stop()
    assert status_of(servers).state is FleetState.stopped
    assert_nothing_left([*groups, status.pid])
    with pytest.raises(EngineError, match="Connection refused"):
        HttpEngine(infos[0].url, num_ranks=1, timeout_s=1.0).weight_version()
    servers.stop()


def test_killed_server_comes_back_at_its_url_until_restarts_are_used_up(start: Callable[..., LocalServers]) -> None:
    servers = start(num_servers=2, max_restarts=1)
    infos = servers.wait_ready(lambda line: None)
    victim, bystander = status_of(servers).servers
    os.kill(victim.pid or 0, signal.SIGKILL)
    wait_until(lambda: status_of(servers).servers[0].restarts == 1, "restart")
    assert status_of(servers).state is FleetState.degraded
    assert "signal SIGKILL" in status_of(servers).servers[0].message
    wait_until(lambda: status_of(servers).state is FleetState.ready, "recovery")
    assert_nothing_left([victim.pid or 0])
    again = status_of(servers).servers[0]
    assert (again.url, again.restarts) == (infos[0].url, 1)
    assert status_of(servers).servers[1] == bystander
    os.kill(again.pid or 0, signal.SIGKILL)
    wait_until(lambda: status_of(servers).servers[0].state is ProcessState.failed, "giving up")
    status = status_of(servers)
    assert status.state is FleetState.degraded
    assert "gave up after 1 restarts" in status.message
    assert HttpEngine(bystander.url, num_ranks=1, timeout_s=5.0).weight_version() == "0"
    os.kill(bystander.pid or 0, signal.SIGKILL)
    wait_until(lambda: status_of(servers).servers[1].restarts == 1, "restart of the other")


def test_failed_start_shows_the_end_of_the_log(start: Callable[..., LocalServers]) -> None:
    servers = start(num_servers=2, extra_args=["--fail-start", "no such architecture"])
    with pytest.raises(ServerStartError) as caught:
        servers.wait_ready(lambda line: None)
    message = str(caught.value)
    assert "ended before it was healthy, exit code 1" in message
    assert re.search(r"server-[01]\.log", message), message
    assert "no such architecture" in message
    assert_nothing_left([status_of(servers).pid])


def test_start_has_a_time_limit(start: Callable[..., LocalServers]) -> None:
    servers = start(startup_timeout_s=2.0, extra_args=["--never-healthy"])
    with pytest.raises(ServerStartError, match=r"not healthy within 2 s \(rollout.server.startup_timeout_s\)"):
        servers.wait_ready(lambda line: None)


def test_server_that_ignores_sigterm_is_killed(start: Callable[..., LocalServers]) -> None:
    servers = start(extra_args=["--deaf"])
    servers.wait_ready(lambda line: None)
    groups = leaders(status_of(servers))
    servers.stop()
    assert_nothing_left(groups)


TRAINER = """
import sys, time
from pathlib import Path
from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
from megatron_rlvr.rollout.server import LocalServers
config = RolloutConfig(server=ServerConfig(num_servers=2))
servers = LocalServers(config, model_path=sys.argv[1], dtype=DType.fp32, run_dir=Path(sys.argv[2]))
servers.wait_ready(lambda line: None)
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("together", [False, True], ids=["trainer", "trainer_and_supervisor"])
def test_nothing_survives_a_killed_trainer(model: Path, tmp_path: Path, together: bool) -> None:
    argv = [sys.executable, "-c", TRAINER, str(model), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        status = read_status(tmp_path / "servers")
        assert status is not None
        if together:
            os.kill(status.pid, signal.SIGSTOP)  # cannot react any more
            os.kill(status.pid, signal.SIGKILL)
        trainer.kill()
    assert_nothing_left([*leaders(status), status.pid])


def test_killed_during_start_leaves_nothing_either(model: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", TRAINER, str(model), str(tmp_path)]
    with subprocess.Popen(argv) as trainer:

        def starting() -> FleetStatus | None:
            status = read_status(tmp_path / "servers")
            return status if status is not None and len(leaders(status)) == 2 else None

        status = wait_until(starting, "start of two servers")
        os.kill(status.pid, signal.SIGKILL)
        trainer.kill()
    assert_nothing_left([*leaders(status), status.pid])


def test_serve_writes_where_its_servers_are_and_ends_on_sigterm(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "discovery"
    argv = [sys.executable, "-m", "megatron_rlvr.serve", "experiment_name=served", f"model.path={model}"]
    argv += ["model.dtype=fp32", f"rollout.discovery={folder}"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as serve:
        assert serve.stdout is not None
        said = next(line for line in serve.stdout if line.endswith(" ready, 0 restarts\n"))
        [registered] = current_servers(folder)
        status = read_status(folder / registered.id.partition(".")[0])
        assert status is not None
        assert (registered.url, registered.pid) == (status.urls[0], status.servers[0].pid)
        assert status.state is FleetState.ready
        assert status.pid == serve.pid
        assert said == f"server-0 {status.urls[0]} ready, 0 restarts\n"
        assert HttpEngine(status.urls[0], num_ranks=1, timeout_s=5.0).weight_version() == "0"
        serve.terminate()
        serve.communicate()
    assert serve.returncode == 0
    assert current_servers(folder) == []
    final = read_status(folder / registered.id.partition(".")[0])
    assert final is not None
    assert final.state is FleetState.stopped
    assert_nothing_left(leaders(status))


@pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not installed")
def test_router_spreads_requests_and_comes_back(start: Callable[..., LocalServers]) -> None:
    servers = start(num_servers=2, router=True)
    infos = servers.wait_ready(lambda line: None)
    url = servers.router_url
    assert url is not None
    assert url not in {info.url for info in infos}
    router = status_of(servers).router
    assert router is not None

    def generate(number: int) -> bool:
        body = {"input_ids": [number, 1], "sampling_params": {"max_new_tokens": 2}, "rid": str(number)}
        status, answer = wire.request(url, "POST", "/generate", body=body, timeout_s=30.0)
        return status == 200 and json.loads(answer)["meta_info"]["id"] == str(number)

    assert all(generate(number) for number in range(8))
    assert wire.request(url, "POST", "/pause_generation", body={"mode": "retract"}, timeout_s=5.0)[0] == 404
    one, both = [infos[0].url], [info.url for info in infos]
    use_workers(url, one)
    wait_until(lambda: list(worker_urls(url)) == one, "one server to be out of the router")
    assert all(generate(number) for number in range(20, 24))
    use_workers(url, both)
    wait_until(lambda: sorted(worker_urls(url)) == sorted(both), "it to be back")
    os.kill(router.pid or 0, signal.SIGKILL)

    def back() -> bool:
        now = status_of(servers).router
        return now is not None and now.restarts == 1 and now.state is ProcessState.ready

    wait_until(back, "restart of the router")
    assert generate(9)
    servers.stop()
    assert_nothing_left([*leaders(status_of(servers)), router.pid or 0])
