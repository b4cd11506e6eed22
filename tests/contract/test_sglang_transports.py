"""Every transport, from a Megatron trainer in TP2 x PP2 into the two ranks of a real SGLang server, with experts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
from megatron_rlvr.rollout.arguments import WEIGHT_LOADER
from megatron_rlvr.rollout.engine import HttpEngine, ServerInfo
from megatron_rlvr.rollout.server import LocalServers
from megatron_rlvr.sync.engine_loader import LOADER
from tests.contract.conftest import PROMPT
from tests.contract.hugging_face import continuation_logprobs
from tests.contract.talk import FORCED
from tests.distributed.ranks import run_ranks
from tests.fakes.tiny_experts import write_tiny_experts

SCRIPT = Path(__file__).with_name("transport_job.py")
TRANSPORTS = ["broadcast", "shards", "colocated"]

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trainer's model and the one that the server starts with."""
    root = tmp_path_factory.mktemp("transports")
    return write_tiny_experts(root / "trainer", seed=3), write_tiny_experts(root / "server")


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    """One server with two tensor-parallel ranks."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    settings = ServerConfig(tp=2, max_total_tokens=4096, max_running_requests=8, mem_fraction=0.5)
    run_dir = tmp_path_factory.mktemp("server")
    servers = LocalServers(RolloutConfig(server=settings), model_path=folders[1], dtype=DType.fp32, run_dir=run_dir)
    try:
        [info] = servers.wait_ready(lambda line: print(line, file=sys.stderr))
        yield info
    finally:
        servers.stop()


@pytest.fixture(scope="module")
def results(server: ServerInfo, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("results") / "results.json"
    job = {
        "model": str(folders[0]),
        "other": str(folders[1]),
        "url": server.url,
        "parallel": {"tp": 2, "pp": 2},
        "transports": TRANSPORTS,
        "out": str(out),
    }
    run_ranks(SCRIPT, [json.dumps(job)], world_size=4)
    answers = json.loads(out.read_text())
    # What SGLang itself makes of the trainer's folder is what all transports must have made.
    engine = HttpEngine(server.url, num_ranks=2, timeout_s=60.0)
    engine.update_from_disk(str(folders[0]), weight_version=99)
    return answers | {"disk": engine.weights_checksum()}


def test_servers_know_the_loader(server: ServerInfo) -> None:
    assert LOADER == WEIGHT_LOADER
    assert server.weight_loaders == (LOADER,)
    assert server.odd_layout == ()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_server_holds_the_trainers_weights(
    transport: str, results: dict[str, Any], folders: tuple[Path, Path]
) -> None:
    result = results[transport]
    assert result["checksums"] == [results["disk"]] * 2
    assert result["version"] == str(10 * TRANSPORTS.index(transport) + 2)
    expected = continuation_logprobs(folders[0], PROMPT, FORCED)
    np.testing.assert_allclose(result["logprobs"], expected, atol=1e-4)
    # embedding, head, last norm, and in each of four layers qkv, gate-up, two more matrices, a router and four norms
    assert result["verified"] == 3 + 4 * 9
    assert result["logprob_diff"] < 1e-4


def test_slices_are_half_of_a_broadcast(results: dict[str, Any]) -> None:
    """Both server ranks take a broadcast; of the slices, each takes its own."""
    broadcast, shards = (2 * sum(results["broadcast"]["sent"][0])), sum(results["shards"]["sent"][0])
    assert shards <= 0.6 * broadcast
