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
from megatron_rlvr.types import MicroBatch, RolloutGroup


@dataclass(kw_only=True, slots=True)
class StepShare:
    """What one data-parallel rank trains on in one optimizer step, as it travels from rank 0."""

    micro_batches: list[list[PackedSequence]]
    idle: list[list[PackedSequence]]
    """Responses that the gradient does not see: their advantage is exactly 0. Only the metrics look at them."""


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


def deal(
    groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray], options: DealOptions
) -> list[list[StepShare]]:
    """Cuts groups into optimizer steps and deals every step's responses to ranks and micro-batches.

    A mini-batch takes consecutive groups; its loss weights carry the denominators of the whole mini-batch, so any
    further cut leaves the loss unchanged.

    Args:
        advantages: float [G] of every group; aborted responses are left out of training.

    Returns:
        ``shares[dp_rank][update]``.

    Raises:
        ValueError: a mini-batch without a single usable response.
    """
    per_update = np.array_split(np.arange(len(groups)), options.updates_per_rollout)
    shares: list[list[StepShare]] = [[] for _ in range(options.dp_size)]
    for update, members in enumerate(per_update):
        sequences = _sequences([groups[m] for m in members], [advantages[m] for m in members], options)
        if not sequences:
            raise ValueError(f"update {update} of this rollout batch has no usable response: all were aborted or empty")
        idle = [s for s in sequences if s.advantage == 0.0] if options.elide_zero_advantage else []
        kept = [s for s in sequences if s.advantage != 0.0] if options.elide_zero_advantage else sequences
        # A step whose gradient is zero is still a step: the optimizer's moments decay, the schedule moves on.
        kept_plan = _plan(kept, options) if kept else [[[]] * options.micro_batch_multiple] * options.dp_size
        idle_plan = _plan(idle, options) if idle else [[] for _ in range(options.dp_size)]
        for dp_rank in range(options.dp_size):
            shares[dp_rank].append(
                StepShare(
                    micro_batches=kept_plan[dp_rank],
                    idle=idle_plan[dp_rank],
                )
            )
    return shares


def _plan(sequences: Sequence[PackedSequence], options: DealOptions) -> list[list[list[PackedSequence]]]:
    """``plan[dp_rank][micro_batch]``, balanced over ranks, the same number of micro-batches on each."""
    plan = plan_microbatches(
        [sequence.num_tokens for sequence in sequences],
        dp_size=options.dp_size,
        max_tokens=options.max_tokens_per_microbatch,
        multiple_of=options.micro_batch_multiple,
    )
    return [[[sequences[i] for i in micro] for micro in micro_batches] for micro_batches in plan]


def _sequences(
    groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray], options: DealOptions
) -> list[PackedSequence]:
    """Usable responses of a mini-batch in canonical order; `trajectory` counts them."""
    sequences: list[PackedSequence] = []
    for group, advantage_G in zip(groups, advantages, strict=True):
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
    idle: list[MicroBatch]
    """Looked at for the metrics alone; see `StepShare.idle`."""


def pack_share(share: StepShare, *, pad_to_multiple: int, device: torch.device) -> UpdateBatch:
    """Packed tensors of a rank's share on its device."""

    def pack(micro_batches: Sequence[Sequence[PackedSequence]]) -> list[MicroBatch]:
        return [on_device(build_microbatch(s, pad_to_multiple=pad_to_multiple), device) for s in micro_batches]

    return UpdateBatch(micro_batches=pack(share.micro_batches), idle=pack(share.idle))


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
