"""Where the wall-clock time of a step goes: every second between two steps is booked somewhere."""

from __future__ import annotations

import time

STEP_TIMES = ("rollout_s", "train_s", "diagnostics_s", "sync_s", "checkpoint_s", "record_s")
"""Parts of a step's time, which add up to the wall clock; evaluations are not among them."""


class StepClock:
    """Wall-clock seconds of the parts of a step.

    Args:
        after: the clock of the step before; time since its last lap falls into this step. None begins now.
    """

    def __init__(self, after: StepClock | None = None) -> None:
        self._last: float = time.monotonic() if after is None else after._last
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Books seconds that fell into one part under another."""
        self.laps[source] -= seconds
        self.laps[target] = self.laps.get(target, 0.0) + seconds
