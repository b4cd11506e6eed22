"""Held-out accuracies and the law's points, as the rows of a run have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.metrics import LAW_ENTROPY_KEYS

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out accuracy at one step."""

    step: int
    accuracy: float
    num_problems: int | None

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy as a share of `num_problems` independent problems."""
        if not self.num_problems:
            return None
        return math.sqrt(max(self.accuracy * (1 - self.accuracy), 0.0) / self.num_problems)


def evaluations(rows: Sequence[Row]) -> list[Evaluation]:
    """What was measured on held-out problems; ``eval/start_accuracy`` of a row is that before its step."""
    found = []
    for row in rows:
        for key, step in (("eval/start_accuracy", row["step"] - 1), ("eval/accuracy", row["step"])):
            if row.get(key) is not None:
                problems = row.get("eval/num_problems")
                found.append(
                    Evaluation(step=step, accuracy=row[key], num_problems=None if problems is None else int(problems))
                )
    return found


@dataclass(frozen=True, slots=True)
class LawPoint:
    """One point of the law R = -a exp(H) + b."""

    evaluation: Evaluation
    entropy: float
    """nats."""


def law_entropy_key(rows: Sequence[Row]) -> str:
    """The metric that the run's points take their entropy from."""
    present = (key for key in LAW_ENTROPY_KEYS if any(row.get(key) is not None for row in rows))
    return next(present, LAW_ENTROPY_KEYS[0])


def law_points(rows: Sequence[Row]) -> list[LawPoint]:
    """Evaluations with the entropy of their step, in order. That before the first step goes with the first step's
    entropy, which is of the same policy."""
    key = law_entropy_key(rows)
    entropy = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    points = {}
    for evaluation in evaluations(rows):
        of_step = entropy.get(evaluation.step, entropy.get(evaluation.step + 1))
        if of_step is not None:
            points[evaluation.step] = LawPoint(evaluation, float(of_step))
    return [points[step] for step in sorted(points)]
