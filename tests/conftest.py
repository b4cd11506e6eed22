"""Fixtures of more than one folder: a tiny model, and one real SGLang server for the whole session."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch in the test process must not fight the server for cores

from megatron_rlvr.config.schema import DType, RolloutConfig, ServerConfig
from megatron_rlvr.rollout.server import LocalServers, ServerInfo
from tests.fakes.tiny_qwen3 import write_tiny_qwen3

SHARED_PARTS = ("contract", "slurm")


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C and hands that down; what tests start listens as in the foreground."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Dealer(LoadScopeScheduling):
    """Deals tests to pytest-xdist's workers: whole folders whose tests share a server or a cluster, else files."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.split("/")[1]
        return folder if folder in SHARED_PARTS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Dealer:
    """Of pytest-xdist; `make test` uses three workers."""
    return Dealer(config, log)


@dataclass(frozen=True, kw_only=True, slots=True)
class RealServer:
    """A running SGLang server with the weights of `model`."""

    url: str
    model: Path
    """Hugging Face folder of the two-layer Qwen3 it was started with."""
    info: ServerInfo


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Qwen3 (hidden 64, 259 tokens, fp32) with a byte tokenizer."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny_qwen3") / "model")


@pytest.fixture(scope="session")
def other_tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("other_tiny_qwen3") / "model", seed=1)


@pytest.fixture(scope="session")
def real_servers(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """One real SGLang server of the session, under its supervisor; mark tests that use it with ``server``."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    config = RolloutConfig(server=ServerConfig(max_total_tokens=4096, max_running_requests=16, mem_fraction=0.5))
    run_dir = tmp_path_factory.mktemp("real_server")
    servers = LocalServers(config, model_path=tiny_qwen3, dtype=DType.fp32, run_dir=run_dir)
    try:
        yield servers
    finally:
        servers.stop()


@pytest.fixture(scope="session")
def real_server(real_servers: LocalServers, tiny_qwen3: Path) -> RealServer:
    """The session's server, ready. Whoever changes its weights puts them back (`update_from_disk`)."""
    [info] = real_servers.wait_ready(lambda line: print(line, file=sys.stderr))
    return RealServer(url=info.url, model=tiny_qwen3, info=info)
