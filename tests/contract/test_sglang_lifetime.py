"""A real server of two tensor-parallel ranks serves, takes weights, comes back when killed, and leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
from megatron_rlvr.rollout import lifetime
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.server import LocalServers
from tests.contract.conftest import PROMPT
from tests.contract.hugging_face import continuation_logprobs
from tests.contract.talk import FORCED, forced_logprobs
from tests.contract.trainer_rank import GROUP, TrainerRank

PATIENCE_S = 300.0
pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {PATIENCE_S:g} s: {what}")


def schedulers(group: int) -> list[int]:
    """The processes that hold the model; SGLang names them."""
    members = lifetime.group_members(group)
    return [pid for pid in members if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_two_ranks_serve_are_updated_killed_restarted_and_stopped(
    tiny_qwen3: Path, other_tiny_qwen3: Path, tmp_path: Path
) -> None:
    config = RolloutConfig(server=ServerConfig(tp=2, max_total_tokens=4096, max_running_requests=16, mem_fraction=0.5))
    servers = LocalServers(config, model_path=tiny_qwen3, dtype=DType.fp32, run_dir=tmp_path)

    def status() -> FleetStatus:
        found = servers.status()
        assert found is not None
        return found

    try:
        [info] = servers.wait_ready(print)
        assert info.num_ranks == 2
        assert_serves(info.url, tiny_qwen3)

        engine = HttpEngine(info.url, num_ranks=2, timeout_s=120.0)
        rank = TrainerRank(engine)
        engine.pause("retract")
        engine.begin_update()
        rank.send(load_file(other_tiny_qwen3 / "model.safetensors"), 7)
        engine.end_update()
        engine.flush_cache()
        engine.resume()
        assert engine.weight_version() == "7"
        assert_serves(info.url, other_tiny_qwen3)
        engine.destroy_group(GROUP)

        group = status().servers[0].pid or 0
        assert len(schedulers(group)) == 2
        os.kill(schedulers(group)[0], signal.SIGKILL)
        wait_until(lambda: status().servers[0].restarts == 1, "restart")
        assert list(lifetime.group_members(group)) == []
        wait_until(lambda: status().state is FleetState.ready, "recovery")
        assert engine.weight_version() == "0"
        assert_serves(info.url, tiny_qwen3)
        group = status().servers[0].pid or 0
    finally:
        servers.stop()
    assert list(lifetime.group_members(group)) == []
    assert not lifetime.scratch_folder(group).exists()


def assert_serves(url: str, model: Path) -> None:
    expected = continuation_logprobs(model, PROMPT, FORCED)
    np.testing.assert_allclose(forced_logprobs(url, PROMPT), expected, atol=1e-4, rtol=0.0)
