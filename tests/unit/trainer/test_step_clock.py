"""Every second between two steps is booked somewhere."""

from __future__ import annotations

import time

import pytest

from megatron_rlvr.trainer.step_clock import StepClock


def test_parts_of_all_steps_add_up_to_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = StepClock()
    laps = []
    for _ in range(3):
        clock = StepClock(after=clock)
        clock.lap("record")
        now += 2.0
        clock.lap("rollout")
        now += 1.0
        clock.lap("train")
        clock.move(0.25, "train", "diagnostics")
        laps.append(clock.laps)
        now += 0.5  # what comes after the row of a step is the next one's
    assert laps[0] == {"record": 0.0, "rollout": 2.0, "train": 0.75, "diagnostics": 0.25}
    assert laps[1] == laps[2] == laps[0] | {"record": 0.5}
    assert sum(sum(each.values()) for each in laps) + 0.5 == now - 100.0
