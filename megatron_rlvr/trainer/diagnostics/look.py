"""Which responses of a rollout batch the diagnostics look at, dealt to ranks by rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.schema import DiagnosticsConfig
from megatron_rlvr.data.packing import PackedSequence
from megatron_rlvr.report.samples import Sample
from megatron_rlvr.trainer.diagnostics.law_setup import law_reference
from megatron_rlvr.trainer.update.batch import DealOptions, plan_sequences, usable_sequences
from megatron_rlvr.types import RolloutGroup


def check_diagnostics(config: DiagnosticsConfig) -> None:
    """Checks the section.

    Raises:
        ValueError: a value out of range, an option that would be ignored, or a reference run that is not there.
    """
    default = DiagnosticsConfig()
    for name, least in (("every", 0), ("probe_responses", 0), ("token_samples", 0), ("window", 2), ("law_patience", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"diagnostics.{name} must be at least {least}, got {getattr(config, name)}")
    if config.every == 0:
        for name in ("probe_responses", "token_samples"):
            if getattr(config, name) != getattr(default, name):
                raise NoEffectError(
                    f"diagnostics.{name} has no effect while diagnostics.every is 0, got {getattr(config, name)}",
                    option=f"diagnostics.{name}",
                    because=["diagnostics.every"],
                )
    law_reference(config.law_reference)


@dataclass(kw_only=True, slots=True)
class ProbeShare:
    """One rank's part of the probe responses of one data source."""

    source: str
    num_tokens: int
    """Response tokens of the source's probe over all data-parallel ranks."""
    micro_batches: list[list[PackedSequence]]


@dataclass(kw_only=True, slots=True)
class Look:
    """What one data-parallel rank is to look at in one step, as it travels from rank 0."""

    probes: list[ProbeShare]
    """The same sources in the same order on every rank."""
    watched: list[tuple[int, int]]
    """(update, trajectory) of responses whose tokens are kept one by one; all ranks have the whole list."""


def plan_look(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[np.ndarray],
    options: DealOptions,
    *,
    probe_responses: int,
    samples: Sequence[Sample],
) -> list[Look]:
    """One look a data-parallel rank.

    Args:
        groups: the step's groups.
        advantages: float [G] of every group.
        options: as the batch is dealt for training.
        probe_responses: evenly spread over the batch's usable responses; all of them where they are fewer.
        samples: rollouts to watch (of those that are in the update).
    """
    sequences = usable_sequences(groups, advantages, options)
    count = min(probe_responses, len(sequences))
    chosen = [sequences[i] for i in np.linspace(0, len(sequences) - 1, count).round().astype(int)] if count else []
    places = response_places(groups, options.updates_per_rollout)
    shown = [(sample.group_index, sample.number) for sample in samples]
    watched = [places[response] for response in shown if response in places]
    looks = [Look(probes=[], watched=watched) for _ in range(options.dp_size)]
    for source in sorted({sequence.source for sequence in chosen}):
        of_source = [sequence for sequence in chosen if sequence.source == source]
        plan = plan_sequences(of_source, options)
        num_tokens = sum(len(sequence.response_ids) for sequence in of_source)
        for look, micro_batches in zip(looks, plan, strict=True):
            look.probes.append(ProbeShare(source=source, num_tokens=num_tokens, micro_batches=micro_batches))
    return looks


def response_places(groups: Sequence[RolloutGroup], updates_per_rollout: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(update, trajectory), as `deal` counts them, by (index of the group, index in it); usable responses only."""
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for update, members in enumerate(np.array_split(np.arange(len(groups)), updates_per_rollout)):
        trajectory = 0
        for member in members:
            for number, rollout in enumerate(groups[member].rollouts):
                if rollout.valid:
                    places[int(member), number] = (update, trajectory)
                    trajectory += 1
    return places
