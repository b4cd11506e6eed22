"""From scored groups to each rank's packed micro-batches of every optimizer step.

P prompts, G responses of a prompt, N responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_rlvr.data.packing import PackedSequence, build_microbatch, plan_microbatches
from megatron_rlvr.loss.aggregation import token_weights
from megatron_rlvr.trainer.update.elision import systematic_sample
from megatron_rlvr.trainer.update.prompt_sharing import unit_cost, units
from megatron_rlvr.types import MicroBatch, RolloutGroup


@dataclass(kw_only=True, slots=True)
class StepShare:
    """What one data-parallel rank trains on in one optimizer step, as it travels from rank 0."""

    micro_batches: list[list[PackedSequence]]
    probed: list[list[PackedSequence]]
    """Elided responses (their advantage is exactly 0) that have a forward pass without gradient."""
    idle: list[list[PackedSequence]]
    """Elided responses without any pass; they only count."""
    probe_scale: ProbeScale


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeScale:
    """How many elided ones each probed one stands for, over all ranks."""

    tokens: float = 1.0
    responses: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DealOptions:
    """How a batch is cut."""

    updates_per_rollout: int
    aggregation: str
    max_response_tokens: int
    max_tokens_per_microbatch: int
    dp_size: int
    micro_batch_multiple: int
    """The number of micro-batches per rank is a multiple of it (pipeline stages under interleaving)."""
    elide_zero_advantage: bool
    """Keep responses with zero advantage out of the micro-batches of the update."""
    probed_share: float = 1.0
    """Share of these that have a forward pass without gradient."""
    share_prompts: bool = False
    """Let the responses of a group share one computation of their prompt."""


def deal(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[np.ndarray],
    options: DealOptions,
    *,
    regimes: Sequence[str] = (),
) -> list[list[StepShare]]:
    """Cuts groups into optimizer steps and deals every step's responses to ranks and micro-batches.

    A mini-batch takes consecutive groups; its loss weights carry the denominators of the whole mini-batch, so any
    further cut leaves the loss unchanged.

    Args:
        advantages: float [G] of every group; aborted responses are left out of training.
        regimes: of every group, for the metrics; may be left out.

    Returns:
        ``shares[dp_rank][update]``.

    Raises:
        ValueError: a mini-batch without a single usable response.
    """
    per_update = np.array_split(np.arange(len(groups)), options.updates_per_rollout)
    shares: list[list[StepShare]] = [[] for _ in range(options.dp_size)]
    for update, members in enumerate(per_update):
        sequences = usable_sequences(
            [groups[m] for m in members],
            [advantages[m] for m in members],
            options,
            regimes=[regimes[m] for m in members] if len(regimes) else (),
        )
        if not sequences:
            raise ValueError(f"update {update} of this rollout batch has no usable response: all were aborted or empty")
        elided = [s for s in sequences if s.advantage == 0.0] if options.elide_zero_advantage else []
        kept = [s for s in sequences if s.advantage != 0.0] if options.elide_zero_advantage else sequences
        chosen = set(systematic_sample(len(elided), options.probed_share))
        probed = [s for i, s in enumerate(elided) if i in chosen]
        idle = [s for i, s in enumerate(elided) if i not in chosen]
        # A step whose gradient is zero is still a step: the optimizer's moments decay, the schedule moves on.
        kept_plan = plan_sequences(kept, options) if kept else [[[]] * options.micro_batch_multiple] * options.dp_size
        nothing: list[list[list[PackedSequence]]] = [[] for _ in range(options.dp_size)]
        probed_plan = plan_sequences(probed, options) if probed else nothing
        idle_plan = plan_sequences(idle, options) if idle else nothing
        scale = _scale(elided, probed) if probed else ProbeScale()
        for dp_rank in range(options.dp_size):
            shares[dp_rank].append(
                StepShare(
                    micro_batches=kept_plan[dp_rank],
                    probed=probed_plan[dp_rank],
                    idle=idle_plan[dp_rank],
                    probe_scale=scale,
                )
            )
    return shares


def _scale(elided: Sequence[PackedSequence], probed: Sequence[PackedSequence]) -> ProbeScale:
    tokens = [sum(len(s.response_ids) for s in part) for part in (elided, probed)]
    return ProbeScale(tokens=tokens[0] / tokens[1], responses=len(elided) / len(probed))


def plan_sequences(sequences: Sequence[PackedSequence], options: DealOptions) -> list[list[list[PackedSequence]]]:
    """``plan[dp_rank][micro_batch]``, balanced over ranks, the same number of micro-batches on each."""
    dealt = [[sequence] for sequence in sequences]
    if options.share_prompts:
        dealt = units(sequences, dp_size=options.dp_size, max_tokens=options.max_tokens_per_microbatch)
    plan = plan_microbatches(
        [unit_cost(unit) for unit in dealt],
        dp_size=options.dp_size,
        max_tokens=options.max_tokens_per_microbatch,
        multiple_of=options.micro_batch_multiple,
    )
    return [[[s for i in micro for s in dealt[i]] for micro in micro_batches] for micro_batches in plan]


def usable_sequences(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[np.ndarray],
    options: DealOptions,
    *,
    regimes: Sequence[str] = (),
) -> list[PackedSequence]:
    """Usable responses of a mini-batch in canonical order; `trajectory` counts them."""
    sequences: list[PackedSequence] = []
    of_groups = zip(groups, advantages, regimes or [""] * len(groups), strict=True)
    for number, (group, advantage_G, regime) in enumerate(of_groups):
        for rollout, advantage in zip(group.rollouts, advantage_G, strict=True):
            if rollout.valid:
                sequences.append(
                    PackedSequence(
                        prompt_ids=group.prompt.input_ids,
                        response_ids=rollout.response_ids,
                        advantage=float(advantage),
                        weight=0.0,
                        rollout_logprobs=rollout.rollout_logprobs,
                        trajectory=len(sequences),
                        source=group.prompt.data_source,
                        regime=regime,
                        group=number,
                    )
                )
    if not sequences:
        return []
    lengths_N = np.array([len(sequence.response_ids) for sequence in sequences])
    weights_N = token_weights(lengths_N, options.aggregation, options.max_response_tokens)
    return [replace(sequence, weight=float(w)) for sequence, w in zip(sequences, weights_N, strict=True)]


@dataclass(kw_only=True, slots=True)
class UpdateBatch:
    """One rank's packed tensors of one optimizer step."""

    micro_batches: list[MicroBatch]
    probed: list[MicroBatch]
    """See `StepShare`."""
    idle: list[MicroBatch]
    probe_scale: ProbeScale


def pack_share(share: StepShare, *, pad_to_multiple: int, device: torch.device) -> UpdateBatch:
    """Packed tensors of a rank's share on its device."""
    return UpdateBatch(
        micro_batches=pack_sequences(share.micro_batches, pad_to_multiple=pad_to_multiple, device=device),
        probed=pack_sequences(share.probed, pad_to_multiple=pad_to_multiple, device=device),
        idle=pack_sequences(share.idle, pad_to_multiple=pad_to_multiple, device=device),
        probe_scale=share.probe_scale,
    )


def pack_sequences(
    micro_batches: Sequence[Sequence[PackedSequence]], *, pad_to_multiple: int, device: torch.device
) -> list[MicroBatch]:
    """Packed tensors of planned micro-batches on a device."""
    return [on_device(build_microbatch(s, pad_to_multiple=pad_to_multiple), device) for s in micro_batches]


def on_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on `device`."""
    if device.type == "cpu":
        return micro
    tensors = {
        name: getattr(micro, name).to(device, non_blocking=True)
        for name in micro.__slots__
        if isinstance(getattr(micro, name), torch.Tensor)
    }
    return replace(micro, **tensors)
