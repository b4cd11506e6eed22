"""Servers of any node come, go and come back in the folder that a trainer reads."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest

from megatron_rlvr.config.schema import DType, RolloutConfig
from megatron_rlvr.rollout import address, membership
from megatron_rlvr.rollout.address import address_facing
from megatron_rlvr.rollout.discovery import ProcessState, ProcessStatus
from megatron_rlvr.rollout.membership import Registration, current_servers, publish_model, published_model
from megatron_rlvr.rollout.server import LocalServers, ServerStartError
from tests.fakes.sglang_server import FakeSGLang

READY = ProcessStatus(
    name="server-0",
    url="http://10.0.0.7:21000",
    num_ranks=2,
    state=ProcessState.ready,
    pid=7,
    restarts=0,
    log="/run/server-0.log",
    message="ready",
)
SECOND = dataclasses.replace(READY, name="server-1", url="http://10.0.0.7:21001", pid=8)


def urls(folder: Path) -> list[str]:
    return [server.url for server in current_servers(folder)]


def test_servers_come_leave_and_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    assert current_servers(folder) == []
    here = Registration(folder)
    starting = dataclasses.replace(SECOND, state=ProcessState.starting)
    here.publish([READY, starting])
    assert urls(folder) == [READY.url]
    here.publish([READY, SECOND])
    first, second = current_servers(folder)
    assert (first.id, second.id) == (f"{here.name}.server-0", f"{here.name}.server-1")
    assert (first.num_ranks, first.pid, first.restarts) == (2, 7, 0)
    here.publish([dataclasses.replace(READY, state=ProcessState.restarting, pid=None, restarts=1), SECOND])
    assert urls(folder) == [SECOND.url]
    here.publish([dataclasses.replace(READY, pid=9, restarts=1), SECOND])
    back = current_servers(folder)[0]
    assert (back.id, back.pid, back.restarts) == (first.id, 9, 1)
    here.withdraw()
    assert current_servers(folder) == []


def test_supervisors_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    supervisors = [Registration(tmp_path) for _ in range(3)]
    assert len({each.own_folder for each in supervisors}) == 3
    for number, each in enumerate(supervisors):
        each.publish([dataclasses.replace(READY, url=f"http://10.0.0.{number}:1")])
    assert sorted(urls(tmp_path)) == ["http://10.0.0.0:1", "http://10.0.0.1:1", "http://10.0.0.2:1"]
    supervisors[1].withdraw()
    assert sorted(urls(tmp_path)) == ["http://10.0.0.0:1", "http://10.0.0.2:1"]


def test_a_lost_node_expires_and_a_heartbeat_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Registration(tmp_path)
    here.publish([READY])
    [entry] = tmp_path.glob("*.server-0.json")
    almost, over = membership.EXPIRY_S - 5.0, membership.EXPIRY_S + 5.0
    os.utime(entry, (time.time() - almost,) * 2)
    assert urls(tmp_path) == [READY.url]
    os.utime(entry, (time.time() - over,) * 2)
    assert urls(tmp_path) == []
    here.beat()
    assert urls(tmp_path) == [], "a heartbeat is written only every HEARTBEAT_S"
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.0)
    here.beat()
    assert urls(tmp_path) == [READY.url]
    entry.unlink()
    here.beat()
    assert urls(tmp_path) == [READY.url], "what somebody removed is registered again"


def test_readers_never_see_half_an_entry(tmp_path: Path) -> None:
    here = Registration(tmp_path)
    done = threading.Event()

    def write() -> None:
        for number in range(200):
            here.publish([dataclasses.replace(READY, restarts=number, url="http://h:1" + "0" * (number % 50))])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert len(current_servers(tmp_path)) <= 1
    writer.join()
    assert [server.restarts for server in current_servers(tmp_path)] == [199]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "id": "x"}'])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.server-0.json").write_text(text)
    with pytest.raises(ValueError, match=r"node.server-0.json must be written by megatron_rlvr.serve"):
        current_servers(tmp_path)


def test_the_trainer_tells_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    assert published_model(folder) is None
    publish_model(folder, tmp_path / "model")
    assert published_model(folder) == str(tmp_path / "model")
    (folder / "model.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match=r"model.json must be written by megatron_rlvr.train"):
        published_model(folder)


def test_a_trainer_finds_registered_servers(tmp_path: Path) -> None:
    """It waits for as many as it was told, and says what is missing when they do not come."""
    config = RolloutConfig(discovery=str(tmp_path / "servers"), min_servers=2)
    config.server.startup_timeout_s = 30.0
    servers = LocalServers(config, model_path=tmp_path, dtype=DType.fp32, run_dir=tmp_path)
    assert published_model(tmp_path / "servers") == str(tmp_path)
    here, there = Registration(tmp_path / "servers"), Registration(tmp_path / "servers")
    with FakeSGLang() as one, FakeSGLang() as two:
        here.publish([dataclasses.replace(READY, url=one.url)])
        news: list[str] = []

        def on_progress(line: str) -> None:
            news.append(line)
            there.publish([dataclasses.replace(READY, url=two.url)])

        assert {info.url for info in servers.wait_ready(on_progress)} == {one.url, two.url}
        assert news[0].startswith("1 of 2 servers have registered in ")
    there.withdraw()
    config.server.startup_timeout_s = 0.1
    with pytest.raises(ServerStartError, match=r"1 of 2 servers have registered .* within 0.1 s"):
        servers.wait_ready(lambda line: None)
    servers.stop()


def test_servers_on_this_machine_are_faced_by_loopback() -> None:
    assert address_facing([]) == "127.0.0.1"
    assert address_facing(["http://127.0.0.1:30000", "http://127.0.1.3:30000"]) == "127.0.0.1"


def test_the_command_prints_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert address.main(["--facing", "localhost", "127.0.1.2"]) == 0
    assert address.main(["--interface", "lo"]) == 0
    assert capsys.readouterr().out == "127.0.0.1\n127.0.0.1\n"
    assert address.main(["--interface", "ib77"]) == 2
    assert address.main(["--facing", "no such host"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "network interface must be one of" in err
    assert "got 'ib77'" in err
