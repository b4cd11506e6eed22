"""Which responses of a group share one computation of their prompt, and what is dealt to ranks together.

A token of the prompt has the same hidden state before every response, and its gradient is the sum over them: computing
it once is exact, to rounding. What it costs: the responses' attention needs a mask over their keys, as large as the
longest response times its sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rlvr.config.training import SharedPrompts
from megatron_rlvr.data.packing import PackedSequence

LEAST_SAVED = 0.05
"""Share of a unit's tokens that must be saved for its responses to share their prompt."""
LARGEST_MASK = 1 << 24
"""Queries times keys of one response's attention; a response of 4,000 tokens has about so many."""
KEYS_PER_TOKEN = 2
"""Keys that a micro-batch's attention gathers, at most, for each token of its budget."""
UNITS_PER_RANK = 4
"""At least so many units a rank, where there are so many responses: balance needs small pieces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPlan:
    """Whether responses of a group share the computation of their prompt."""

    reason: str | None
    """Why they do not; None where they do."""

    @property
    def is_on(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return "once for all responses of a group" if self.is_on else f"for every response: {self.reason}"


def plan_prompts(mode: SharedPrompts, *, attends_packed: bool, has_auxiliary_loss: bool) -> PromptPlan:
    """What `train.share_prompts` comes to with this model.

    Args:
        attends_packed: whether attention is this project's; transformer-engine's knows no shared prompts.
        has_auxiliary_loss: whether the model adds a loss of its own over all tokens.

    Raises:
        ValueError: sharing is demanded where it cannot be.
    """
    if mode is SharedPrompts.never:
        return PromptPlan(reason="train.share_prompts=never")
    reason = None
    if not attends_packed:
        reason = "transformer-engine's attention has no keys in common"
    elif has_auxiliary_loss:
        reason = "the model's auxiliary loss counts the routing of all tokens"
    if mode is SharedPrompts.always and reason is not None:
        raise ValueError(f"train.share_prompts must be auto or never here, got 'always': {reason}")
    return PromptPlan(reason=reason)


def units(sequences: Sequence[PackedSequence], *, dp_size: int, max_tokens: int) -> list[list[PackedSequence]]:
    """Cuts every group into units of neighbours that stay together; those that are to share their prompt say so.

    A unit fits into a micro-batch, and leaves every rank `UNITS_PER_RANK` units to balance where there are so many
    responses.

    Args:
        sequences: of one optimizer step; neighbours of the same `group` have the same prompt.
        max_tokens: budget of a micro-batch.
    """
    total = sum(sequence.num_tokens for sequence in sequences)
    budget = min(max_tokens, math.ceil(total / (UNITS_PER_RANK * dp_size)))
    made: list[list[PackedSequence]] = []
    for _, group in itertools.groupby(sequences, key=lambda sequence: sequence.group):
        unit: list[PackedSequence] = []
        for sequence in group:
            if not unit or unit_cost([*unit, sequence]) > budget or _largest_mask([*unit, sequence]) > LARGEST_MASK:
                made += _marked(unit, number=len(made))
                unit = []
            unit.append(sequence)
        made += _marked(unit, number=len(made))
    return made


def unit_cost(unit: Sequence[PackedSequence]) -> int:
    """Tokens that a unit takes of a micro-batch's budget.

    Those that are packed, or half of those that its attention gathers keys for, where these are more: what sharing
    saves in tokens must not come back as memory for keys and values.
    """
    gathered = sum(sequence.num_tokens for sequence in unit)
    return max(gathered - _saved(unit), math.ceil(gathered / KEYS_PER_TOKEN))


def _saved(unit: Sequence[PackedSequence]) -> int:
    return (len(unit) - 1) * (len(unit[0].prompt_ids) - 1)


def _largest_mask(unit: Sequence[PackedSequence]) -> int:
    return max((len(sequence.response_ids) + 1) * sequence.num_tokens for sequence in unit)


def _marked(unit: list[PackedSequence], *, number: int) -> list[list[PackedSequence]]:
    """The unit with its number on every sequence; its sequences one by one where sharing saves too little."""
    if len(unit) < 2 or _saved(unit) < max(1.0, LEAST_SAVED * sum(sequence.num_tokens for sequence in unit)):
        return [[sequence] for sequence in unit]
    return [[replace(sequence, shared_prompt=number) for sequence in unit]]
