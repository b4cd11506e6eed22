"""A real server and a real router want the key, take it from the run's processes, and show it nowhere."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
from megatron_rlvr.rollout.api_key import use_key_file
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.messages import RolloutError, Sampling
from megatron_rlvr.rollout.router_workers import use_workers, worker_urls
from megatron_rlvr.rollout.server import LocalServers
from tests.contract.conftest import PROMPT

KEY = "a-key-that-nobody-else-knows-4711"
pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


@pytest.fixture
def key_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(KEY)
    use_key_file(path)
    yield path
    use_key_file(None)


async def sample(url: str, router_url: str | None) -> int:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=3)
    async with GenerationClient(
        [url], router_url=router_url, concurrency=4, request_timeout_s=60.0, max_retries=0, recovery_s=1.0
    ) as client:
        await client.check()
        with client.place(1) as placement:
            answer = await client.generate(np.array(PROMPT, np.int32), sampling, rid="a", placement=placement)
    return len(answer.output_ids)


def wait_for_workers(router_url: str, urls: list[str]) -> None:
    """The router does in the background what it is told."""
    deadline = time.monotonic() + 120.0
    while list(worker_urls(router_url)) != urls:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_key_is_wanted_and_never_shown(key_file: Path, tiny_qwen3: Path, tmp_path: Path) -> None:
    server = ServerConfig(router=True, max_total_tokens=4096, max_running_requests=16, mem_fraction=0.5)
    run_dir = tmp_path / "run"
    servers = LocalServers(
        RolloutConfig(server=server, api_key_file=str(key_file)),
        model_path=tiny_qwen3,
        dtype=DType.fp32,
        run_dir=run_dir,
    )
    try:
        [info] = servers.wait_ready(print)
        assert servers.router_url is not None
        family = psutil.Process(os.getpid()).children(recursive=True)
        assert any("launcher" in " ".join(process.cmdline()) for process in family)
        for process in family:
            assert KEY not in " ".join(process.cmdline())
            assert KEY not in "".join(process.environ().values())

        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
        for url in (info.url, servers.router_url):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                assert requests.post(url + "/generate", json=body, headers=headers, timeout=60).status_code == 401
        for path in ("/pause_generation", "/update_weights_from_disk", "/server_info"):
            assert requests.post(info.url + path, json={}, timeout=60).status_code == 401

        assert asyncio.run(sample(info.url, None)) > 0
        assert asyncio.run(sample(info.url, servers.router_url)) > 0
        # A router that gets a server while it runs has to know its key as well.
        for urls in ([], [info.url]):
            use_workers(servers.router_url, urls)
            wait_for_workers(servers.router_url, urls)
        assert asyncio.run(sample(info.url, servers.router_url)) > 0
        engine = HttpEngine(info.url, num_ranks=1, timeout_s=60.0)
        engine.pause("retract")
        engine.resume()
        engine.set_weight_version(5)
        assert engine.weight_version() == "5"
        use_key_file(None)
        with pytest.raises(RolloutError, match="HTTP 401"):
            asyncio.run(sample(info.url, None))
    finally:
        servers.stop()
    for path in run_dir.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), f"{path} shows the key"
