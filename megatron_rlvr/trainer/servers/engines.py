"""Servers as the trainer's main rank keeps them: which of them take part in syncs, and where rollouts come from."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_rlvr.config.schema import RunConfig, SyncConfig
from megatron_rlvr.metrics import Max, Metric
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.rollout.engine import HttpEngine, ServerInfo
from megatron_rlvr.rollout.router_workers import use_workers
from megatron_rlvr.rollout.server import LocalServers
from megatron_rlvr.rollout.service import RolloutService
from megatron_rlvr.sync.coordinator import OnMain, SyncReport, WeightSync
from megatron_rlvr.sync.pool import EnginePool
from megatron_rlvr.trainer.checks.transport import with_padding
from megatron_rlvr.trainer.servers.transports import make_transport
from megatron_rlvr.trainer.servers.verifying import weight_verifier
from megatron_rlvr.types import EngineAddress


def http_engine(address: EngineAddress, *, config: SyncConfig) -> HttpEngine:
    """The engine at an address, with the deadlines of the configuration."""
    return HttpEngine(
        address.url,
        num_ranks=address.num_ranks,
        timeout_s=config.timeout_s,
        control_timeout_s=min(config.control_timeout_s, config.timeout_s),
    )


def server_pool(servers: LocalServers, config: RunConfig) -> EnginePool:
    """The run's servers; a local one that hangs is ended, and comes back through its supervisor."""
    return EnginePool(
        listed=servers.listed,
        connect=partial(http_engine, config=config.sync),
        patience_s=config.rollout.recovery_timeout_s,
        on_stuck=lambda address: servers.end_at(address.url),
    )


def open_sync(
    config: RunConfig,
    servers: Sequence[ServerInfo],
    *,
    local: LocalServers | None,
    policy: Policy,
    parallel: ParallelContext,
    on_main: OnMain,
) -> WeightSync:
    """This rank's end of the weight syncs; collective.

    Args:
        servers: those that are there now.
        local: who knows which are there later, on the main rank.
        on_main: runs a call there.
    """
    servers = [with_padding(server, policy.shape) for server in servers]
    engines = [http_engine(server.address, config=config.sync) for server in servers]
    return WeightSync(
        gate=parallel,
        on_main=on_main,
        pool=server_pool(local, config) if local is not None else None,
        connect=partial(http_engine, config=config.sync),
        transport=make_transport(config, engines, servers, weights=policy.weights, parallel=parallel),
        pause_mode=config.sync.pause_mode.value,
        verifier=weight_verifier(config, servers, policy=policy, parallel=parallel),
    )


class DiskPush:
    """Weights by way of a folder: each push writes its own, and the last one goes when the new one is everywhere."""

    def __init__(self, root: Path, *, is_main: bool) -> None:
        self._root = root
        self._is_main = is_main
        self._count = 0

    def push(self, sync: WeightSync, policy: Policy, *, version: int) -> SyncReport:
        """Collective; raises as `WeightSync.run_from_disk`."""
        self._count += 1
        folder = self._root / f"weights-{self._count}"
        policy.save_hf(folder, like=policy.path)
        report = sync.run_from_disk(str(folder.resolve()), policy.weights, version=version)
        if self._is_main:
            for old in self._root.iterdir():
                if old != folder:
                    shutil.rmtree(old)
        return report


class Routing:
    """Lets rollouts come from the servers that hold the weights of the last sync, and from no others.

    Args:
        service: the rollout process.
        servers: the run's, and the router before them.
    """

    def __init__(self, service: RolloutService, servers: LocalServers) -> None:
        self._service = service
        self._servers = servers
        self._serving: list[EngineAddress] = []

    def start(self, urls: Sequence[str]) -> None:
        """Before the first sync: the servers that are there; a router knows them already."""
        self._service.connect(urls, router_url=self._servers.router_url)

    def follow(self, report: SyncReport) -> list[str]:
        """Changes the routing to the servers that have taken a sync, all of which have the weights now.

        Returns:
            A line about every server that came or went.

        Raises:
            RolloutError: the router does not do as told.
        """
        before, now = self._serving, report.serving
        urls = [address.url for address in now]
        if now != before and before and self._servers.router_url is not None:
            use_workers(self._servers.router_url, urls)
        # Also where nothing has changed: a server that was started anew at its old address is let in by this alone.
        self._service.use(urls, router_url=self._servers.router_url)
        self._serving = now
        if not before:
            return []
        gone = [address.url for address in before if address not in now]
        come = [address.url for address in now if address not in before]
        return [
            *(f"server {url} is out of routing: {report.failures.get(url, 'it has left')}" for url in gone),
            *(f"server {url} is in routing" for url in come),
        ]


def sync_metrics(report: SyncReport) -> dict[str, Metric]:
    """What a sync came to, as the same numbers on every rank."""
    metrics: dict[str, Metric] = {
        "sync/engines": Max(float(len(report.serving))),
        "sync/engines_out": Max(float(len(report.failures))),
        "sync/attempts": Max(float(report.num_attempts)),
        "sync/verified": Max(float(report.num_verified)),
    }
    if report.logprob_diff is not None:
        metrics["sync/logprob_diff"] = Max(report.logprob_diff)
    return metrics
