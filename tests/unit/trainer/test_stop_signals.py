"""Requests to stop: at once while nothing is at stake, held afterwards, and never heard twice by accident."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from megatron_rlvr.config.checkpoints import SIGNAL_ECHO_S
from megatron_rlvr.config.compose import load_config
from megatron_rlvr.trainer import endings, stopping
from megatron_rlvr.trainer.session import Session
from megatron_rlvr.trainer.stopping import REQUESTS, RunInterruptedError, StopSignals
from megatron_rlvr.types import EngineError


class LeftError(Exception):
    """Stands for the end of the process."""


def leave(error: BaseException) -> NoReturn:
    raise LeftError from error


@pytest.fixture
def loading() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (*REQUESTS, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = StopSignals(leave=leave)
    signals.install()
    yield signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stop(loading: StopSignals) -> StopSignals:
    loading.begin()
    return loading


@pytest.mark.parametrize("number", [*REQUESTS, signal.SIGINT])
def test_while_libraries_are_loaded_a_request_ends_the_process(loading: StopSignals, number: signal.Signals) -> None:
    with pytest.raises(LeftError) as left:
        signal.raise_signal(number)
    assert isinstance(left.value.__cause__, KeyboardInterrupt if number is signal.SIGINT else RunInterruptedError)


def test_the_launchers_echo_does_not_disturb_an_end_that_takes_long(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunInterruptedError):
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: 1e9)
    signal.raise_signal(signal.SIGTERM)
    assert isinstance(stop.interruption, RunInterruptedError)


def test_what_an_interruption_breaks_is_known_to_come_of_it(stop: StopSignals) -> None:
    """A C++ library turns a Python exception into one of its own, or swallows it."""
    with pytest.raises(RunInterruptedError):
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(stop.interruption, RunInterruptedError)
    stop.hold()
    assert stop.interruption is None, "the run went on, so what comes now has another reason"
    with pytest.raises(RunInterruptedError), stop.interruptible():
        raise AssertionError("not reached")


LOST = "Connection closed by peer [127.0.0.1]:46792"


def test_a_request_that_another_rank_heard_first(stop: StopSignals) -> None:
    def collective() -> None:
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        raise RuntimeError(LOST)

    with pytest.raises(RunInterruptedError, match="SIGTERM"), endings.lost_peers_explained(stop):
        collective()
    assert isinstance(stop.interruption, RunInterruptedError)


def test_a_rank_that_is_gone_by_itself(stop: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "REQUEST_COMES_S", 0.01)
    with pytest.raises(RuntimeError, match="closed by peer"), endings.lost_peers_explained(stop):
        raise RuntimeError(LOST)
    monkeypatch.setattr(endings, "REQUEST_COMES_S", 1e9)
    with pytest.raises(RuntimeError, match="another reason"), endings.lost_peers_explained(stop):
        raise RuntimeError("another reason")


def test_ctrl_c_stops_at_once(stop: StopSignals) -> None:
    stop.hold()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert isinstance(stop.interruption, KeyboardInterrupt)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """A job in a shell's background."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*REQUESTS, signal.SIGINT)}
    StopSignals(leave=leave).install()
    signal.raise_signal(signal.SIGINT)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", REQUESTS)
def test_before_training_a_request_ends_the_run_where_it_stands(stop: StopSignals, number: signal.Signals) -> None:
    with pytest.raises(RunInterruptedError, match=number.name):
        signal.raise_signal(number)
    assert stop.reason == number.name


def test_in_training_it_is_held_until_somebody_waits(stop: StopSignals) -> None:
    stop.hold()
    signal.raise_signal(signal.SIGUSR1)
    assert stop.reason == "SIGUSR1"
    with pytest.raises(RunInterruptedError), stop.interruptible():
        raise AssertionError("not reached")


def test_while_rollouts_are_awaited_it_is_heard_at_once(stop: StopSignals) -> None:
    stop.hold()
    with pytest.raises(RunInterruptedError), stop.interruptible():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # an echo: nothing happens


def test_the_second_request_stops_at_once(stop: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    stop.hold()
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    signal.raise_signal(signal.SIGUSR1)
    now[0] += SIGNAL_ECHO_S - 0.1
    signal.raise_signal(signal.SIGTERM)
    now[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_the_end_is_not_disturbed(stop: StopSignals) -> None:
    stop.hold()
    stop.release()
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason is None


def test_servers_that_end_of_the_same_request_are_no_failure(stop: StopSignals, tmp_path: Path) -> None:
    """A batch system's SIGTERM reaches the trainer, its rollout process and its servers at once."""
    alone = SimpleNamespace(ranks=SimpleNamespace(is_main=True), broadcast_object=lambda value: value)
    session = Session(load_config(["experiment=quickstart"]), alone, tmp_path, None, stop)  # type: ignore[arg-type]

    def refused() -> None:
        raise EngineError("refused", url="http://127.0.0.1:1")

    def mistaken() -> None:
        raise ValueError("a mistake")

    stop.hold()
    with pytest.raises(EngineError):
        session.on_main(refused)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(RunInterruptedError, match="SIGTERM"):
        session.on_main(refused)
    with pytest.raises(ValueError, match="a mistake"):
        session.on_main(mistaken)
