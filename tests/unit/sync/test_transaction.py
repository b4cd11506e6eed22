"""A weight sync is all or nothing at every engine, whoever fails at whatever moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from megatron_rlvr.sync.coordinator import MAX_ATTEMPTS, SyncReport, WeightSync
from megatron_rlvr.sync.parameter_sums import checksum
from megatron_rlvr.sync.pool import EnginePool, NoEngineError
from megatron_rlvr.sync.verification import WeightVerifier
from megatron_rlvr.types import EngineAddress, EngineError
from megatron_rlvr.weights.engine_params import EnginePlace
from megatron_rlvr.weights.slices import axis_box
from tests.fakes.engines import DictSource, DirectTransport, MemoryEngine, OneRank, address

TENSORS = ("a", "b", "c")


class Fleet:
    """Servers that come and go, and the sync that follows them."""

    def __init__(self, *names: str, patience_s: float = 0.3) -> None:
        self.listed = [address(name) for name in names]
        self.engines: dict[EngineAddress, MemoryEngine] = {}
        self.killed: list[str] = []
        self.on_listing: Callable[[], None] = lambda: None
        self.transport = DirectTransport()
        self.pool = EnginePool(
            listed=self._list, connect=self.connect, patience_s=patience_s, on_stuck=lambda a: self.killed.append(a.id)
        )
        self.sync = WeightSync(
            gate=OneRank(),
            on_main=lambda call: call(),
            pool=self.pool,
            connect=self.connect,
            transport=self.transport,
            pause_mode="retract",
        )

    def _list(self) -> list[EngineAddress]:
        self.on_listing()
        return self.listed

    def connect(self, where: EngineAddress) -> MemoryEngine:
        return self.engines.setdefault(where, MemoryEngine(where.url))

    def __getitem__(self, name: str) -> MemoryEngine:
        return self.connect(next(a for a in self.listed if a.id == name))

    def run(self, version: int) -> SyncReport:
        source = DictSource({name: torch.full((2,), float(version)) for name in TENSORS})
        return self.sync.run(source, version=version)  # type: ignore[arg-type]

    def restart(self, name: str) -> MemoryEngine:
        old = next(a for a in self.listed if a.id == name)
        new = address(name, restarts=old.restarts + 1)
        self.listed = [new if a is old else a for a in self.listed]
        return self.connect(new)


def names(report: SyncReport) -> list[str]:
    return [where.id for where in report.serving]


def test_all_take_the_version() -> None:
    fleet = Fleet("one", "two")
    for version in (1, 2):
        report = fleet.run(version)
        assert (names(report), report.failures, report.num_attempts) == (["one", "two"], {}, 1)
        assert report.num_bytes == 3 * 2 * 4
        assert [fleet[name].serve() for name in ("one", "two")] == [(version, float(version))] * 2
    assert fleet.transport.group_changes == [["http://one", "http://two"]], "groups stay while servers do"
    assert fleet["one"].calls.count("freeze_gc") == 1
    assert fleet["one"].calls[-7:] == ["update"] * 3 + ["end_update", "set_weight_version", "flush_cache", "resume"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_lost_in_the_middle_of_a_transfer(at: int) -> None:
    fleet = Fleet("one", "two")
    fleet.run(1)

    def kill(index: int) -> None:
        if index == at:
            fleet["two"].dead = True

    fleet.transport.before_tensor = kill
    report = fleet.run(2)
    assert names(report) == ["one"]
    assert fleet["one"].serve() == (2, 2.0)
    assert report.num_attempts == 2
    assert "refused" in report.failures["http://two"]
    assert fleet.transport.group_changes[1:] == [[], ["http://one"]], "groups are left before they are made anew"
    # Dead servers cost nothing from then on, and none is out for good: the same process ...
    assert (names(fleet.run(3)), fleet.run(3).num_attempts) == (["one"], 1)
    fleet.transport.before_tensor = lambda index: None
    fleet["two"].dead = False
    assert fleet["two"].paused, "it holds a mixture and was never let go"
    assert names(fleet.run(4)) == ["one", "two"]
    assert fleet["two"].serve() == (4, 4.0)
    # ... or a new one under its name.
    new = fleet.restart("two")
    assert names(fleet.run(5)) == ["one", "two"]
    assert new.serve() == (5, 5.0)


@pytest.mark.parametrize("call", ["pause", "begin_update", "end_update", "set_weight_version", "flush_cache"])
def test_one_that_fails_a_control_call_is_out_until_the_next_sync(call: str) -> None:
    fleet = Fleet("one", "two")
    fleet.run(1)
    fleet["two"].refuse(call)
    report = fleet.run(2)
    assert names(report) == ["one"]
    assert report.failures == {"http://two": f"POST http://two/{call}: refused by the test"}
    assert fleet["one"].serve() == (2, 2.0)
    assert call == "pause" or fleet["two"].paused
    assert names(fleet.run(3)) == ["one", "two"]
    assert fleet["two"].serve() == (3, 3.0)
    assert fleet.pool.failures == {}


def test_a_transfer_that_a_living_server_refused_is_repeated_to_all() -> None:
    fleet = Fleet("one", "two")
    fleet["two"].refuse("update")
    report = fleet.run(1)
    assert (names(report), report.num_attempts) == (["one", "two"], 2)
    assert fleet["two"].calls.count("settle") == 2, "as it came, and after the failure"


def test_a_server_that_refuses_twice_is_out() -> None:
    fleet = Fleet("one", "two")
    for _ in range(2):
        fleet["two"].refuse("update", "shapes differ")
    report = fleet.run(1)
    assert (names(report), report.num_attempts) == (["one"], 3)
    assert fleet["one"].serve() == (1, 1.0)


def test_one_that_does_not_answer_is_ended_so_that_it_comes_back() -> None:
    fleet = Fleet("one", "two")
    fleet.run(1)

    def hang(index: int) -> None:
        fleet["two"].silent |= index == 1

    fleet.transport.before_tensor = hang
    assert names(fleet.run(2)) == ["one"]
    assert fleet.killed == ["two"]
    fleet.transport.before_tensor = lambda index: None
    assert names(fleet.run(3)) == ["one"]
    assert fleet.killed == ["two"], "it is asked again, briefly, and not ended again"
    fleet.restart("two")
    assert names(fleet.run(4)) == ["one", "two"]


def test_the_last_one_is_waited_for() -> None:
    fleet = Fleet("one", patience_s=30.0)
    fleet.run(1)
    fleet["one"].dead = True
    listings = 0

    def come_back() -> None:
        nonlocal listings
        listings += 1
        if listings == 4:
            fleet.restart("one")

    fleet.on_listing = come_back
    report = fleet.run(2)
    assert names(report) == ["one"]
    assert fleet["one"].serve() == (2, 2.0)


def test_with_nobody_left_the_reason_is_told() -> None:
    fleet = Fleet("one", "two")
    fleet.run(1)
    fleet["one"].dead = True
    fleet["two"].silent = True
    with pytest.raises(NoEngineError, match=r"no server is left to sync with, after 0.3 s: http://one: .*refused"):
        fleet.run(2)
    fleet.listed = []
    with pytest.raises(NoEngineError, match="none is registered"):
        fleet.run(3)


def test_a_transfer_that_fails_for_no_servers_fault_ends() -> None:
    fleet = Fleet("one")

    def break_down(index: int) -> None:
        raise EngineError("the group is broken")

    fleet.transport.before_tensor = break_down
    with pytest.raises(EngineError, match=f"version 1 failed {MAX_ATTEMPTS} times; the last time: the group is broken"):
        fleet.run(1)
    assert fleet["one"].paused


def test_servers_join_and_leave_between_syncs() -> None:
    fleet = Fleet("one")
    fleet.run(1)
    fleet.listed.append(address("two"))
    assert names(fleet.run(2)) == ["one", "two"]
    del fleet.listed[0]
    report = fleet.run(3)
    assert (names(report), report.failures) == (["two"], {"http://one": "it has left"})
    assert fleet.run(3).failures == {}
    assert fleet.transport.group_changes == [["http://one"], ["http://one", "http://two"], ["http://two"]]


def test_a_restart_between_syncs_is_a_new_process() -> None:
    fleet = Fleet("one", "two")
    fleet.run(1)
    new = fleet.restart("two")
    assert fleet.pool.serving == [address("one"), address("two")], "nothing is known before the next sync"
    assert names(fleet.run(2)) == ["one", "two"]
    assert new.calls[:3] == ["settle", "freeze_gc", "pause"]
    assert fleet.transport.group_changes[-1] == ["http://one", "http://two"]
    assert len(fleet.transport.group_changes) == 2


def test_from_disk_one_that_cannot_read_is_out() -> None:
    fleet = Fleet("one", "two")
    fleet.sync.transport = None
    fleet["two"].refuse("update_from_disk", "no such folder")
    report = fleet.sync.run_from_disk("/weights-7", DictSource({}), version=7)
    assert names(report) == ["one"]
    assert fleet["one"].serve() == (7, 7.0)
    assert "no such folder" in report.failures["http://two"]
    assert "begin_update" not in fleet["one"].calls
    assert names(fleet.sync.run_from_disk("/weights-8", DictSource({}), version=8)) == ["one", "two"]


class PlacedEngine(MemoryEngine):
    """Tells what it holds, and log-probs that depend on it."""

    def weights_checksums(self, *, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        self._called("weights_checksums")
        assert self.paused
        return [{name: checksum(tensor) for name, tensor in self.weights.items() if name not in skip}]

    def prompt_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        self._called("prompt_logprobs")
        return [float(self.weights["a"][0])] * 2


class VersionProbe:
    """Of a trainer whose log-probs are its weights."""

    input_ids = (1, 2, 3)
    tolerance = 0.25

    def __init__(self) -> None:
        self.value = 0.0

    def logprobs(self) -> list[float]:
        return [self.value] * 2


def verified(fleet: Fleet) -> VersionProbe:
    """Lets a fleet's syncs verify everything."""
    place = {n: EnginePlace(n, (2,), axis_box((2,), 0, 0, 2), axis_box((2,), 0, 0, 2)) for n in TENSORS}
    probe = VersionProbe()
    fleet.sync.verifier = WeightVerifier(
        places=lambda tp: [place], dtype=torch.float32, sample=False, gate=OneRank(), probe=probe
    )
    for where in fleet.listed:
        fleet.engines[where] = PlacedEngine(where.url)
    return probe


def test_one_that_holds_other_weights_is_out_and_taken_back() -> None:
    fleet = Fleet("one", "two")
    probe = verified(fleet)
    probe.value = 1.0
    report = fleet.run(1)
    assert (names(report), report.num_verified, report.logprob_diff) == (["one", "two"], 3, 0.0)
    two = fleet["two"]
    two.on_end = lambda: two.weights["b"].view(torch.uint8)[3].bitwise_xor_(1)
    probe.value = 2.0
    report = fleet.run(2)
    assert (names(report), report.num_attempts) == (["one"], 1), "the others need not take it again"
    assert "http://two holds other weights than were sent: b (" in report.failures["http://two"]
    assert two.paused
    two.on_end = lambda: None
    probe.value = 3.0
    assert names(fleet.run(3)) == ["one", "two"]


def test_the_last_one_that_holds_other_weights_takes_them_again_at_once() -> None:
    fleet = Fleet("one")
    probe = verified(fleet)
    probe.value = 1.0
    one = fleet["one"]
    flips = iter([True])
    one.on_end = lambda: one.weights["c"].neg_() if next(flips, False) else None
    report = fleet.run(1)
    assert (names(report), report.num_attempts) == (["one"], 2)
    assert one.serve() == (1, 1.0)


def test_one_that_computes_something_else_is_out() -> None:
    fleet = Fleet("one", "two")
    probe = verified(fleet)
    probe.value = 1.5
    fleet["one"].prompt_logprobs = lambda input_ids: [1.4, 1.6]  # type: ignore[method-assign]
    report = fleet.run(1)
    assert names(report) == ["one"]
    assert report.logprob_diff == pytest.approx(0.1)
    assert "off by 0.5 nats" in report.failures["http://two"]
    assert fleet["two"].paused


def test_memory_is_lent_between_syncs() -> None:
    fleet = Fleet("one", "two")
    fleet.run(1)
    fleet["two"].refuse("release_memory")
    fleet.sync.release_memory()
    assert [where.id for where in fleet.pool.serving] == ["one"]
    report = fleet.run(2)
    assert names(report) == ["one", "two"]
    woken = [call for call in fleet["one"].calls if "memory" in call]
    assert woken == ["release_memory kv_cache weights", "resume_memory weights", "resume_memory kv_cache"]
    assert not [call for call in fleet["two"].calls if call.startswith("resume_memory")]
