"""Gates of QAE that remember a prompt's earlier answers, against the flips of small groups (spec G4).

With G answers the gate of a prompt with success rate near 1 - K flips from visit to visit like a binomial draw.
Counting a share of earlier right and wrong answers (the mean of a Beta posterior that forgets) flips less. Integers
throughout, in units of 1e-6 answers, so that a resumed run decides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

UNIT = 10**6
"""Counts are kept in units of 1 / UNIT answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What became of one visit of a prompt."""

    uid: str
    wrong: int
    total: int


class PromptGate:
    """Wrong and all answers of every prompt, old ones forgotten by a constant share a visit.

    Args:
        memory: share in [0, 1) of the earlier counts that the next visit still counts.

    Example:
        >>> gate = PromptGate("0.5")
        >>> gate.is_hard("train/7", wrong=1, total=4, level=Fraction(2, 5))
        False
        >>> gate.learn([Verdicts(uid="train/7", wrong=4, total=4)])
        >>> gate.is_hard("train/7", wrong=1, total=4, level=Fraction(2, 5))
        True
    """

    def __init__(self, memory: str | Fraction) -> None:
        self.memory = parse_memory(memory)
        self._counts: dict[str, tuple[int, int]] = {}

    def is_hard(self, uid: str, *, wrong: int, total: int, level: Fraction) -> bool:
        """Whether the share of wrong answers, earlier ones included, is at least K.

        On a first visit, and without memory, that is QAE's own gate, wrong >= ceil(K total) (spec A2).

        Args:
            wrong: wrong answers of this visit's group.
            total: valid answers of this visit's group, 1 or above.
            level: K in (0, 1).
        """
        wrong_units, total_units = self._with(uid, wrong, total)
        return wrong_units >= level * total_units

    def learn(self, visits: Sequence[Verdicts]) -> None:
        """Enters visits."""
        for visit in visits:
            if visit.total:
                self._counts[visit.uid] = self._with(visit.uid, visit.wrong, visit.total)

    def _with(self, uid: str, wrong: int, total: int) -> tuple[int, int]:
        old_wrong, old_total = self._counts.get(uid, (0, 0))
        return round(self.memory * old_wrong) + wrong * UNIT, round(self.memory * old_total) + total * UNIT

    def state_dict(self) -> dict[str, Any]:
        """The counts by prompt."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the counts of `state_dict`."""
        self._counts = {uid: (int(wrong), int(total)) for uid, (wrong, total) in state["counts"].items()}


def parse_memory(memory: str | Fraction) -> Fraction:
    """The share as an exact number.

    Raises:
        ValueError: no number, or outside [0, 1).
    """
    try:
        share = Fraction(memory)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"gate_memory must be a number or a string like '0.5', got {memory!r}") from None
    if not 0 <= share < 1:
        raise ValueError(f"gate_memory must be in [0, 1), got {memory!r}")
    return share
