"""Predicted against measured entropy changes over the steps of a run (spec C3).

Predictors, each by its key ``dynamics/<name>``: p1 minus the batch covariance of log-prob and advantage, p2 minus the
group-wise covariance, p3 the per-token attribution, p4 the exact first order of the real update. Measured: m1 the
change on the same tokens, m2 that of the on-policy entropy from one step's rollouts to the next ones'. Only p4 is in
nats and expected to agree with m1 in scale; the others are per unit of a step size that they do not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from megatron_rlvr.entropy.agreement import Agreement, AgreementWindow

PREDICTORS = ("p1", "p2", "p3", "p4")
ENTROPY = "entropy/mean"
SOURCE = "/source/"
"""Between a key and the data source it is of."""
STATISTICS = tuple(field.name for field in fields(Agreement))


class DynamicsMonitor:
    """Keeps, overall and by data source, the latest pairs of every predictor with m1 and m2.

    Args:
        window: Pairs behind correlation, slope and ratio.

    Example:
        >>> monitor = DynamicsMonitor(window=50)
        >>> monitor.observe({"step": 1, "entropy/mean": 0.70, "cov/mean": 0.01})
        {'dynamics/p1': -0.01}
        >>> monitor.observe({"step": 2, "entropy/mean": 0.68, "cov/mean": 0.01})["dynamics/m2"]
        -0.02
    """

    def __init__(self, *, window: int) -> None:
        if window < 2:
            raise ValueError(f"window must be 2 or above, got {window}")
        self.window = window
        self._windows: dict[str, AgreementWindow] = {}
        """By ``p4_m1`` and the like, with the source behind where there is one."""
        self._last_step: int | None = None
        self._entropy: dict[str, float] = {}
        """Of the last step, by source (empty for all)."""
        self._predicted: dict[str, dict[str, float]] = {}
        """By source: what the last step predicted."""

    def observe(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Takes in a step's metrics and gives ``dynamics/p1``, ``dynamics/m2`` and ``agreement/...``.

        Args:
            row: ``step`` and ``entropy/mean``, and whatever of the predictors and of m1 was measured.
        """
        found: dict[str, float] = {}
        if _number(row, "cov/mean") is not None:
            found["dynamics/p1"] = -float(row["cov/mean"])
        step, known = int(row["step"]), {**row, **found}
        follows = self._last_step is not None and step == self._last_step + 1
        entropy, predicted = {}, {}
        for source in _sources(known):
            tail = f"{SOURCE}{source}" if source else ""
            now = _number(known, ENTROPY + (f"/{source}" if source else ""))
            values = {p: v for p in PREDICTORS if (v := _number(known, f"dynamics/{p}{tail}")) is not None}
            if now is not None:
                if follows and source in self._entropy:
                    m2 = now - self._entropy[source]
                    found[f"dynamics/m2{tail}"] = m2
                    found |= self._pair(self._predicted.get(source) or {}, "m2", m2, tail)
                entropy[source] = now
            m1 = _number(known, f"dynamics/m1{tail}")
            if m1 is not None:
                found |= self._pair(values, "m1", m1, tail)
            predicted[source] = values
        self._last_step, self._entropy, self._predicted = step, entropy, predicted
        return found

    def _pair(self, predicted: Mapping[str, float], measured_name: str, measured: float, tail: str) -> dict[str, float]:
        found = {}
        for name, value in predicted.items():
            key = f"{name}_{measured_name}{tail}"
            window = self._windows.setdefault(key, AgreementWindow(size=self.window))
            agreement = window.add(value, measured)
            for statistic in STATISTICS:
                found[f"agreement/{name}_{measured_name}/{statistic}{tail}"] = float(getattr(agreement, statistic))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, as a checkpoint or JSON keeps them."""
        return {
            "windows": {key: window.state_dict() for key, window in self._windows.items()},
            "last_step": self._last_step,
            "entropy": dict(self._entropy),
            "predicted": {source: dict(values) for source, values in self._predicted.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; the size of the window stays this run's own."""
        self._windows = {}
        for key, pairs in state["windows"].items():
            self._windows[key] = AgreementWindow(size=self.window)
            self._windows[key].load_state_dict(pairs)
        self._last_step = None if state["last_step"] is None else int(state["last_step"])
        self._entropy = {source: float(value) for source, value in state["entropy"].items()}
        self._predicted = {
            source: {name: float(value) for name, value in values.items()}
            for source, values in state["predicted"].items()
        }


def _sources(row: Mapping[str, Any]) -> Iterator[str]:
    """The empty name for all tokens, then, where there are several, every data source that has an entropy."""
    yield ""
    named = sorted(key.removeprefix(f"{ENTROPY}/") for key in row if key.startswith(f"{ENTROPY}/"))
    if len(named) > 1:
        yield from named


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return None if value is None or not math.isfinite(value) else float(value)
