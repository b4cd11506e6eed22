"""Weight syncs to two real servers while things go wrong: nobody serves a mixture, nobody is lost for good."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rlvr.config.schema import DType, RolloutConfig, RunConfig, ServerConfig, SyncConfig
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.server import LocalServers
from megatron_rlvr.sync.broadcast import BroadcastTransport
from megatron_rlvr.sync.bucket_check import BucketCheck
from megatron_rlvr.sync.coordinator import SyncReport, WeightSync
from megatron_rlvr.sync.interfaces import WeightTransport
from megatron_rlvr.sync.shards import ShardTransport
from megatron_rlvr.sync.sliced import TrainerEnd
from megatron_rlvr.sync.verification import WeightVerifier
from megatron_rlvr.trainer.servers.engines import http_engine, server_pool
from megatron_rlvr.weights.engine_params import EnginePlace, engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from tests.contract.conftest import PROMPT
from tests.contract.hugging_face import continuation_logprobs
from tests.contract.talk import FORCED, forced_logprobs
from tests.fakes.engines import DictSource, OneRank

pytestmark = pytest.mark.server
SYNC = SyncConfig(timeout_s=60.0, control_timeout_s=30.0)
NUM_SYNCS = 120
GROWTH_MB = 40.0
"""Of any process over the last three quarters of the syncs; each moves 0.6 MB, so that a leak of one would show 54."""


@pytest.fixture(scope="module")
def servers(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """Two servers under a supervisor."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    server = ServerConfig(num_servers=2, max_total_tokens=2048, max_running_requests=8, mem_fraction=0.5)
    run_dir = tmp_path_factory.mktemp("two_servers")
    servers = LocalServers(RolloutConfig(server=server), model_path=tiny_qwen3, dtype=DType.fp32, run_dir=run_dir)
    try:
        servers.wait_ready(lambda line: print(line, file=sys.stderr))
        yield servers
    finally:
        servers.stop()


class Trainer:
    """One trainer rank that pushes one of two sets of weights, alternately: odd versions are `other`.

    Broadcast and disk are verified as with `sync.verify=sample`; shards check themselves.
    """

    def __init__(self, servers: LocalServers, model: Path, other: Path, *, way: str) -> None:
        self.servers = servers
        self.way = way
        self.folders = (model, other)
        self.weights = [load_file(folder / "model.safetensors") for folder in self.folders]
        shape = ModelShape.from_hf(model)

        def places(tp: int) -> list[dict[str, EnginePlace]]:
            return [engine_places(shape, EngineLayout(tp=tp), rank) for rank in range(tp)]

        self.pool = server_pool(servers, RunConfig(experiment_name="faults", sync=SYNC))
        self.sync = WeightSync(
            gate=OneRank(),
            on_main=lambda call: call(),
            pool=self.pool,
            connect=partial(http_engine, config=SYNC),
            transport=transport_of(way, shape, BucketCheck(places=places, dtype=torch.float32)),
            pause_mode="retract",
            verifier=None
            if way == "shards"
            else WeightVerifier(
                places=places,
                dtype=torch.float32,
                sample=True,
                gate=OneRank(),
                probe=None,
                every_parameter=way == "disk",
            ),
        )
        self.version = 0

    def push(self) -> SyncReport:
        self.version += 1
        number = self.version % 2
        source = DictSource(self.weights[number])
        if self.way == "disk":
            return self.sync.run_from_disk(str(self.folders[number]), source, version=self.version)
        return self.sync.run(source, version=self.version)

    def pid_of(self, name: str) -> int:
        status = self.servers.status()
        assert status is not None
        pid = next(server.pid for server in status.servers if server.name == name)
        assert pid is not None
        return pid

    def check(self, report: SyncReport) -> None:
        """Every server that may serve holds this version, whole, and computes with it."""
        expected = continuation_logprobs(self.folders[self.version % 2], PROMPT, FORCED)
        for address in report.serving:
            engine = HttpEngine(address.url, num_ranks=1, timeout_s=30.0)
            assert engine.weight_version() == str(self.version)
            np.testing.assert_allclose(forced_logprobs(address.url, PROMPT), expected, atol=1e-4)


def transport_of(way: str, shape: ModelShape, check: BucketCheck) -> WeightTransport | None:
    """Small buckets, so that every transfer has several."""
    if way == "disk":
        return None
    common = {"bucket_bytes": 1 << 17, "backend": "gloo", "timeout_s": SYNC.timeout_s}
    if way == "broadcast":
        stage = {"stage": 0, "num_stages": 1, "is_source": True, "host": "127.0.0.1"}
        return BroadcastTransport([], **stage, **common, check=check)  # type: ignore[arg-type]
    mapping = Mapping(shape, layout=Layout(), naming="local")
    trainer = TrainerEnd(mapping=mapping, dtype=torch.float32, dp=1, rank=0, gate=OneRank(), host="127.0.0.1")
    return ShardTransport([], trainer=trainer, ep=1, **common)  # type: ignore[arg-type]


@pytest.fixture
def trainer(
    servers: LocalServers, tiny_qwen3: Path, other_tiny_qwen3: Path, request: pytest.FixtureRequest
) -> Iterator[Trainer]:
    trainer = Trainer(servers, tiny_qwen3, other_tiny_qwen3, way=request.param)
    yield trainer
    trainer.sync.close()


def before_bucket(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets `act` see and replace one bucket on its way, counted from now on."""
    seen = 0

    def acted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return act(tensor) if seen == number else tensor

    broadcast, isend = dist.broadcast, dist.isend
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **kwargs: broadcast(acted(tensor), **kwargs))
    monkeypatch.setattr(dist, "isend", lambda tensor, **kwargs: isend(acted(tensor), **kwargs))


def turned(bucket: torch.Tensor) -> torch.Tensor:
    """The bucket with one bit of another value."""
    bucket = bucket.clone()
    bucket[1000] ^= 64
    return bucket


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("broadcast", "holds other weights than were sent: model.layers."),
        ("shards", "ChecksumError: 1 of "),
    ],
    indirect=["trainer"],
)
def test_a_turned_byte_reaches_no_response(
    trainer: Trainer, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bucket is refused as soon as it is there, and the whole transfer repeated."""
    trainer.push()
    before_bucket(monkeypatch, 3, turned)
    commits: list[int] = []
    commit = trainer.pool.commit
    monkeypatch.setattr(trainer.pool, "commit", lambda: (commits.append(trainer.version), commit()))
    report = trainer.push()
    assert reason in caplog.text
    assert (len(report.serving), report.num_attempts, report.failures) == (2, 2, {})
    assert commits == [2], "no server was let go in between"
    trainer.check(report)


@pytest.mark.parametrize("trainer", ["broadcast", "shards"], indirect=True)
def test_one_is_killed_in_the_middle_and_comes_back(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs go on meanwhile, and nobody's memory grows."""
    assert len(trainer.push().serving) == 2
    victim = trainer.pid_of("server-1")

    def kill(bucket: torch.Tensor) -> torch.Tensor:
        os.kill(victim, signal.SIGKILL)
        return bucket

    before_bucket(monkeypatch, 2, kill)
    report = trainer.push()
    monkeypatch.undo()
    assert [address.id for address in report.serving] == ["server-0"]
    trainer.check(report)

    survivor = psutil.Process(trainer.pid_of("server-0"))
    processes = [psutil.Process(), *survivor.children(recursive=True)]
    sizes: list[list[int]] = []
    for count in range(NUM_SYNCS):
        if count in (NUM_SYNCS // 4, NUM_SYNCS - 1):
            sizes.append([process.memory_info().rss for process in processes])
        report = trainer.push()
    growth = [(last - first) / 1e6 for first, last in zip(*sizes, strict=True)]
    print(f"growth in MB over {NUM_SYNCS} syncs by {trainer.way}, this process first: {growth}")
    assert max(growth) < GROWTH_MB, growth

    deadline = time.monotonic() + 180.0
    while len(report.serving) < 2:
        assert time.monotonic() < deadline, report.failures
        time.sleep(0.5)
        report = trainer.push()
    assert trainer.pid_of("server-1") != victim
    trainer.check(report)
    engines = [HttpEngine(address.url, num_ranks=1, timeout_s=30.0) for address in report.serving]
    assert len({engine.weights_checksum() for engine in engines}) == 1


@pytest.mark.parametrize("trainer", ["disk"], indirect=True)
def test_a_folder_that_one_server_reads_wrongly(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights, or with a byte turned: that server is out, the other serves, and the next sync mends it.

    A truncated file ends SGLang, which falls back to the very same folder: the last case of the module.
    """
    report = trainer.push()
    assert len(report.serving) == 2
    trainer.check(report)
    update = HttpEngine.update_from_disk
    victim = report.serving[1].url
    whole = (trainer.folders[0] / "model.safetensors").read_bytes()
    changed = bytearray(whole)
    changed[-1000] ^= 64
    for content, reason in [
        (None, "update_weights_from_disk: HTTP 400"),
        (bytes(changed), "holds other weights than were sent: "),
        (whole[: len(whole) // 2], "update_weights_from_disk: "),
    ]:
        assert trainer.version % 2 == 1
        folder = tmp_path / "bad"
        shutil.copytree(trainer.folders[0], folder)
        (folder / "model.safetensors").unlink()
        if content is not None:
            (folder / "model.safetensors").write_bytes(content)

        def misread(engine: HttpEngine, path: str, *, weight_version: int, folder: Path = folder) -> None:
            update(engine, str(folder) if engine.url == victim else path, weight_version=weight_version)

        with monkeypatch.context() as patch:
            patch.setattr(HttpEngine, "update_from_disk", misread)
            report = trainer.push()
        assert [address.url for address in report.serving] != [victim]
        assert len(report.serving) == 1
        assert reason in report.failures[victim]
        trainer.check(report)
        shutil.rmtree(folder)
        if content == whole[: len(whole) // 2]:
            return
        report = trainer.push()
        assert len(report.serving) == 2, report.failures
        trainer.check(report)
