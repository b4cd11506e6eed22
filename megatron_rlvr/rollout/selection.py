"""Dynamic sampling: how many prompts to draw, and which groups enter the batch.

DAPO keeps groups with some right and some wrong responses and samples until the batch is full (spec A5; verl draws
three batches at once and repeats up to ten times). Here prompts are drawn one by one as outcomes come in, but every
decision looks at outcomes in the order of the data only, so the same outcomes give the same batch however the
responses race.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_rlvr.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Outcome of one step's dynamic sampling. Every group is in exactly one of the three lists, or rejected."""

    groups: list[RolloutGroup]
    """The batch, in the order of the data."""
    surplus: list[RolloutGroup]
    """Accepted, for the next step."""
    num_topped_up: int
    """Groups of the batch that the filter had rejected, taken because the bound on prompts was reached."""
    num_carried: int
    """Groups of the batch that are surplus of earlier steps."""
    num_accepted: int
    """Groups drawn in this step that passed the filter."""
    acceptance: float
    """Accepted share to expect in the next step."""


class GroupSelector:
    """Selects ``wanted`` groups of those drawn, and says how many to draw.

    Draws ahead what the acceptance share makes necessary: with 8 groups missing and half of all accepted, 16 are
    under way. The surplus this may leave is for the next step.

    Args:
        wanted: groups in the batch.
        bound: most prompts to draw.
        keep: the filter.
        carried: surplus of earlier steps.
        acceptance: share of groups expected to pass, in (0, 1].
    """

    def __init__(
        self,
        *,
        wanted: int,
        bound: int,
        keep: Callable[[RolloutGroup], bool],
        carried: list[RolloutGroup],
        acceptance: float = 1.0,
    ) -> None:
        if bound < wanted:
            raise ValueError(f"bound must be at least wanted = {wanted}, got {bound}")
        self.wanted, self.bound = wanted, bound
        self.num_finished = 0
        self._keep = keep
        self._carried = sorted(carried, key=lambda group: group.index)
        self._acceptance = acceptance
        self._accepted: list[RolloutGroup] = []
        self._rejected: list[RolloutGroup] = []
        self._waiting: dict[int, RolloutGroup] = {}
        self._order: list[int] = []
        self._num_seen = 0
        self._target = 0
        self._raise_target()

    @property
    def num_drawn(self) -> int:
        return len(self._order)

    @property
    def num_accepted(self) -> int:
        """Groups that will enter this batch or a later one."""
        return len(self._carried) + len(self._accepted) + sum(map(self._keep, self._waiting.values()))

    @property
    def num_to_draw(self) -> int:
        """Prompts to draw now."""
        return self._target - len(self._order)

    @property
    def complete(self) -> bool:
        """Whether nothing is under way and nothing is to be drawn."""
        return self._num_seen == self._target == len(self._order)

    def draw(self, indices: list[int]) -> None:
        """Takes note of newly drawn prompts, in the order of the data."""
        self._order.extend(indices)

    def finish(self, group: RolloutGroup) -> None:
        """Takes note of a group whose responses all have their verdict."""
        self.num_finished += 1
        self._waiting[group.index] = group
        while self._num_seen < len(self._order) and self._order[self._num_seen] in self._waiting:
            first = self._waiting.pop(self._order[self._num_seen])
            if self._keep(first):
                self._accepted.append(first)
            elif len(self._rejected) < self.wanted:  # more can never be needed
                self._rejected.append(first)
            self._num_seen += 1
            self._raise_target()

    def _raise_target(self) -> None:
        missing = self.wanted - len(self._carried) - len(self._accepted)
        if missing > 0:
            # exact, so that a share like 0.1 cannot draw one prompt too many
            ahead = math.ceil(missing / Fraction(repr(self._acceptance)))
            self._target = min(self.bound, max(self._target, self._num_seen + ahead))

    def select(self) -> Selection:
        """The batch of ``wanted`` groups.

        When the bound was reached before, rejected groups make up the number, so that the batch size is constant.
        """
        assert self.complete, f"{len(self._order) - self._num_seen} groups are under way"
        accepted = self._carried + self._accepted
        groups, surplus = accepted[: self.wanted], accepted[self.wanted :]
        topped_up = self._rejected[: self.wanted - len(groups)]
        return Selection(
            groups=sorted(groups + topped_up, key=lambda group: group.index),
            surplus=surplus,
            num_topped_up=len(topped_up),
            num_carried=min(len(self._carried), self.wanted),
            num_accepted=len(self._accepted),
            acceptance=self._next_acceptance(),
        )

    def _next_acceptance(self) -> float:
        """Mean of the share expected and the share seen, no lower than the bound can make use of."""
        if not self._order:
            return self._acceptance
        seen = len(self._accepted) / len(self._order)
        return max(round((self._acceptance + seen) / 2, 6), self.wanted / self.bound)
