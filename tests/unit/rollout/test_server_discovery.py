"""The discovery file: whole at any moment, and refused when it is not one."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from megatron_rlvr.rollout.discovery import (
    FleetState,
    ProcessState,
    ProcessStatus,
    forget_status,
    new_status,
    read_status,
    write_status,
)

SERVER = ProcessStatus(
    name="server-0",
    url="http://127.0.0.1:21000",
    num_ranks=2,
    state=ProcessState.ready,
    pid=7,
    restarts=1,
    log="/run/server-0.log",
    message="ready",
)
ROUTER = dataclasses.replace(SERVER, name="router", num_ranks=0, state=ProcessState.failed, pid=None, message="gone")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_status(tmp_path / "new") is None
    for router in (None, ROUTER):
        status = new_status(state=FleetState.degraded, servers=(SERVER, SERVER), router=router)
        write_status(tmp_path / "new", status)
        assert read_status(tmp_path / "new") == status
    assert status.urls == [SERVER.url, SERVER.url]
    assert status.message == "gone"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["servers.json"]
    forget_status(tmp_path / "new")
    forget_status(tmp_path / "new")
    assert read_status(tmp_path / "new") is None


def test_readers_never_see_a_torn_file(tmp_path: Path) -> None:
    many = new_status(state=FleetState.ready, servers=(SERVER,) * 200)
    few = new_status(state=FleetState.starting, servers=(SERVER,))
    write_status(tmp_path, few)
    done = threading.Event()

    def write() -> None:
        for _ in range(100):
            write_status(tmp_path, many)
            write_status(tmp_path, few)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert read_status(tmp_path) in (many, few)
    writer.join()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "servers": [{}]}'])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "servers.json").write_text(text)
    with pytest.raises(ValueError, match=r"discovery file .*servers.json must be written by megatron_rlvr.serve"):
        read_status(tmp_path)


def test_format_is_plain_json(tmp_path: Path) -> None:
    write_status(tmp_path, new_status(state=FleetState.ready, servers=(SERVER,)))
    fields = json.loads((tmp_path / "servers.json").read_text())
    assert (fields["format"], fields["state"], fields["router"]) == (1, "ready", None)
    assert fields["servers"][0]["url"] == SERVER.url
    assert fields["servers"][0]["num_ranks"] == 2
