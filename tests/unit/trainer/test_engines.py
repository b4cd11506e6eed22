"""Rollouts come from the servers that hold the trainer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_rlvr.sync.coordinator import SyncReport
from megatron_rlvr.trainer.servers import engines
from megatron_rlvr.trainer.servers.engines import Routing, sync_metrics
from megatron_rlvr.types import EngineAddress
from tests.fakes.engines import address


class Service:
    """A rollout process that notes whom it may use."""

    def __init__(self) -> None:
        self.used: list[list[str]] = []

    def connect(self, urls: Sequence[str], *, router_url: str | None) -> None:
        self.used.append(list(urls))

    use = connect


class Servers:
    router_url: str | None = None

    def __init__(self, *listed: EngineAddress) -> None:
        self._listed = list(listed)

    def listed(self) -> list[EngineAddress]:
        return self._listed


def routing_of(*listed: EngineAddress) -> tuple[Routing, Service, Servers]:
    service, servers = Service(), Servers(*listed)
    return Routing(service, servers), service, servers  # type: ignore[arg-type]


def report_of(*serving: EngineAddress, **failures: str) -> SyncReport:
    return SyncReport(version=1, serving=list(serving), failures={f"http://{n}": t for n, t in failures.items()})


def test_routing_follows_who_serves() -> None:
    one, two = address("one"), address("two")
    routing, service, _ = routing_of(one, two)
    routing.start(["http://one", "http://two"])
    assert routing.follow(report_of(one, two)) == []
    assert routing.follow(report_of(one, two)) == []
    assert routing.follow(report_of(one, two="it hangs")) == ["server http://two is out of routing: it hangs"]
    again = address("two", restarts=1)
    assert routing.follow(report_of(one, again)) == ["server http://two is in routing"]
    both = ["http://one", "http://two"]
    assert service.used == [both, both, both, ["http://one"], both], "told after every sync, as the weights are new"


def test_a_router_is_told_where_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = address("one"), address("two")
    routing, _, servers = routing_of(one, two)
    servers.router_url = "http://router"
    told: list[Any] = []
    monkeypatch.setattr(engines, "use_workers", lambda *args: told.append(args))
    for report in (report_of(one, two), report_of(one, two), report_of(one)):
        routing.follow(report)
    assert told == [("http://router", ["http://one"])]


def test_metrics_of_a_sync() -> None:
    report = report_of(address("one"), two="it hangs")
    report.num_verified, report.logprob_diff = 12, 1e-6
    assert {name: metric.value for name, metric in sync_metrics(report).items()} == {
        "sync/engines": 1.0,
        "sync/engines_out": 1.0,
        "sync/attempts": 1.0,
        "sync/verified": 12.0,
        "sync/logprob_diff": 1e-6,
    }
