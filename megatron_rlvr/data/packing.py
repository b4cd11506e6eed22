"""Packing: which sequences share a micro-batch, and the packed tensors of one micro-batch.

Letters: T packed tokens, S sequences, L prompt tokens, R response tokens.

A sequence of L prompt and R response tokens takes L + R packed positions. Position t predicts the token at t + 1
of the same sequence, so the loss sits on positions L - 1 .. L + R - 2 and the last position predicts nothing.

Responses to the same prompt may share it. Its first L - 1 tokens are then packed once, as a segment without loss; each
response continues that segment with a segment of its own, the prompt's last token (which predicts another token in
every response) and the R response tokens. n such responses take (n - 1) (L - 1) positions less.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_rlvr.types import MicroBatch


@dataclass(kw_only=True, slots=True)
class PackedSequence:
    """One response with everything its loss needs.

    Example:
        >>> PackedSequence(prompt_ids=np.array([5, 6]), response_ids=np.array([7, 2]), advantage=0.5, weight=1 / 128,
        ...                rollout_logprobs=np.array([-0.1, -0.7]), trajectory=3)
    """

    prompt_ids: np.ndarray
    """int [L], L >= 1: the first response token needs a position that predicts it."""
    response_ids: np.ndarray
    """int [R], R >= 1."""
    advantage: float
    """The response's advantage, the same on each of its tokens."""
    weight: float
    """Aggregation weight of each of its tokens, global denominators inside."""
    rollout_logprobs: np.ndarray
    """float [R] nats, the engine's log-probs at sampling."""
    trajectory: int
    """Index of the response in the optimizer step's canonical order, >= 0."""
    source: str = ""
    """Data source of its prompt."""
    regime: str = ""
    """``hard``, ``easy`` or ``degenerate``, its group's (spec A1)."""
    group: int = -1
    """Its group in the optimizer step, -1: not known."""
    shared_prompt: int | None = None
    """Neighbours with the same number have the same prompt and share it; None: it stands alone."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(kw_only=True, slots=True)
class Segment:
    """Consecutive packed tokens of one sequence: all of it, the part that responses share, or a response's own part."""

    prompt_ids: np.ndarray
    """int [L'], those of the prompt's tokens that lie in this segment."""
    sequence: PackedSequence | None
    """Whose response follows them; None: that of nobody, the segment is a shared one."""
    label: PackedSequence
    """A sequence whose source and regime are the segment's."""
    prefix: int = -1
    """Index of the segment that this one continues, -1: none."""
    start: int = 0
    """Position of the first token in its sequence."""

    @property
    def num_response_tokens(self) -> int:
        return 0 if self.sequence is None else len(self.sequence.response_ids)


def plan_microbatches(
    lengths: Sequence[int],
    *,
    dp_size: int,
    max_tokens: int,
    multiple_of: int = 1,
    attention_parity_length: float = math.inf,
) -> list[list[list[int]]]:
    """Deals sequences to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches (unequal numbers deadlock the gradient reduction), as few as
    best-fit-decreasing needs. Within that number, longest-processing-time-first balances the micro-batches, and then
    the ranks. A micro-batch is empty only if there are fewer sequences than micro-batches.

    Args:
        lengths: tokens of each sequence, prompt and response together, >= 1.
        dp_size: number of data-parallel ranks.
        max_tokens: budget of one micro-batch. Padding of `build_microbatch` stays inside it if it is a multiple of
            `pad_to_multiple`.
        multiple_of: the number of micro-batches per rank is a multiple of it (virtual pipelines need that).
        attention_parity_length: sequence length at which attention costs as much as the dense layers (12 * hidden
            size for causal attention in a standard block); balance is by length * (1 + length / this). Infinite:
            balance by tokens.

    Returns:
        Sequence indices, ``plan[dp_rank][micro_batch]``; deterministic in the arguments.

    Raises:
        ValueError: no sequence, a sequence over the budget, or an argument out of range.
    """
    for name, value in (("dp_size", dp_size), ("max_tokens", max_tokens), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if attention_parity_length <= 0:
        raise ValueError(f"attention_parity_length must be positive, got {attention_parity_length}")
    if len(lengths) == 0:
        raise ValueError("lengths must name at least one sequence, got none")
    if min(lengths) < 1:
        raise ValueError(f"lengths must be at least 1, got {min(lengths)}")
    if max(lengths) > max_tokens:
        raise ValueError(
            f"train.max_tokens_per_microbatch must hold the longest sequence (at most data.max_prompt_tokens + "
            f"rollout.max_response_tokens), got {max_tokens} for a sequence of {max(lengths)} tokens"
        )

    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    costs = [length * (1.0 + length / attention_parity_length) for length in lengths]
    tight = _best_fit_decreasing(order, lengths, max_tokens)
    num_micro = math.ceil(len(tight) / dp_size)
    num_micro = math.ceil(num_micro / multiple_of) * multiple_of
    num_bins = dp_size * num_micro

    bins = _longest_first(order, lengths, costs, num_bins, max_tokens)
    if bins is None:  # too tight to balance: keep the packing that is known to fit
        bins = _fill_empty(tight + [[] for _ in range(num_bins - len(tight))], lengths)
    return _deal_to_ranks(bins, costs, dp_size, num_micro)


def _best_fit_decreasing(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins within the budget, few of them (at most 11/9 of the optimum): each sequence into the fullest bin it fits."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in order:
        slot = bisect.bisect_left(rooms, (lengths[index], -1))
        if slot == len(rooms):
            bins.append([index])
            room, chosen = max_tokens, len(bins) - 1
        else:
            room, chosen = rooms.pop(slot)
            bins[chosen].append(index)
        bisect.insort(rooms, (room - lengths[index], chosen))
    return bins


def _longest_first(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Bins of nearly equal cost: each sequence, longest first, into the cheapest bin; None if one overflows."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, 0, chosen) for chosen in range(num_bins)]  # (cost, tokens, bin)
    for index in order:
        cost, tokens, chosen = heap[0]
        if tokens + lengths[index] > max_tokens:
            return None
        bins[chosen].append(index)
        heapq.heapreplace(heap, (cost + costs[index], tokens + lengths[index], chosen))
    return bins


def _fill_empty(bins: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Moves sequences out of the fullest bins that hold several, until no bin is empty or nothing can move."""
    for empty in (chosen for chosen in bins if not chosen):
        donor = max(
            (chosen for chosen in bins if len(chosen) > 1),
            key=lambda chosen: sum(lengths[index] for index in chosen),
            default=None,
        )
        if donor is None:
            break
        empty.append(donor.pop())
    return bins


def _deal_to_ranks(
    bins: list[list[int]], costs: Sequence[float], dp_size: int, num_micro: int
) -> list[list[list[int]]]:
    """`num_micro` bins to each rank, costliest bin first to the rank with the least so far.

    A rank meets its largest micro-batch first, so that the allocator grows once.
    """
    bin_costs = [sum(costs[index] for index in chosen) for chosen in bins]
    plan: list[list[list[int]]] = [[] for _ in range(dp_size)]
    heap = [(0.0, rank) for rank in range(dp_size)]
    for chosen in sorted(range(len(bins)), key=lambda chosen: (-bin_costs[chosen], chosen)):
        total, rank = heapq.heappop(heap)
        plan[rank].append(sorted(bins[chosen]))
        if len(plan[rank]) < num_micro:
            heapq.heappush(heap, (total + bin_costs[chosen], rank))
    return plan


def segments_of(sequences: Sequence[PackedSequence]) -> list[Segment]:
    """The segments of sequences in packing order; of each run of neighbours that share a prompt, the prompt first."""
    segments: list[Segment] = []
    for shared, run in itertools.groupby(sequences, key=lambda sequence: sequence.shared_prompt):
        members = list(run)
        first = members[0]
        num_shared = len(first.prompt_ids) - 1
        if shared is None or len(members) == 1 or num_shared == 0:
            segments += [Segment(prompt_ids=one.prompt_ids, sequence=one, label=one) for one in members]
            continue
        if any(not np.array_equal(one.prompt_ids, first.prompt_ids) for one in members):
            raise ValueError(f"sequences of shared_prompt {shared} must have the same prompt_ids, got several")
        prefix = len(segments)
        segments.append(Segment(prompt_ids=first.prompt_ids[:-1], sequence=None, label=first))
        segments += [
            Segment(prompt_ids=one.prompt_ids[-1:], sequence=one, label=one, prefix=prefix, start=num_shared)
            for one in members
        ]
    return segments


def build_microbatch(sequences: Sequence[PackedSequence], *, pad_to_multiple: int = 1) -> MicroBatch:
    """Packs sequences into the tensors of one micro-batch.

    Args:
        sequences: in packing order; none gives a micro-batch of padding alone, whose loss is exactly zero.
        pad_to_multiple: T is padded up to a multiple of it (sequence and context parallelism need one); the padding
            is a sequence of its own.

    Returns:
        CPU tensors as `MicroBatch` documents them.

    Raises:
        ValueError: an empty prompt or response, log-probs of another length, a negative trajectory, or neighbours
            that are to share a prompt and have different ones.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}")
    for sequence in sequences:
        _check_sequence(sequence)

    segments = segments_of(sequences)
    prompt_S = np.array([len(segment.prompt_ids) for segment in segments], dtype=np.int64)
    response_S = np.array([segment.num_response_tokens for segment in segments], dtype=np.int64)
    length_S = prompt_S + response_S
    used = int(length_S.sum())
    total = max(math.ceil(used / pad_to_multiple), 1) * pad_to_multiple
    padding = total - used
    borders = np.concatenate([[0], np.cumsum(length_S), [total] if padding else []]).astype(np.int64)
    start_S = np.array([segment.start for segment in segments] + [0] * bool(padding), dtype=np.int64)

    tokens_T = np.zeros(total, dtype=np.int64)
    if segments:
        np.concatenate([part for segment in segments for part in _tokens(segment)], out=tokens_T[:used])
    inside_T = np.arange(total, dtype=np.int64) - np.repeat(borders[:-1], np.diff(borders))
    position_T = inside_T + np.repeat(start_S, np.diff(borders))

    # Place p of a segment is masked when L' - 1 <= p < L' + R - 1; its target is response token p - (L' - 1).
    response_position_T = np.full(total, -1, dtype=np.int64)
    offset_T = inside_T[:used] - np.repeat(prompt_S - 1, length_S)
    mask_T = np.zeros(total, dtype=bool)
    mask_T[:used] = (offset_T >= 0) & (offset_T < np.repeat(response_S, length_S))
    response_position_T[:used][mask_T[:used]] = offset_T[mask_T[:used]]

    targets_T = np.zeros(total, dtype=np.int64)
    targets_T[:-1] = tokens_T[1:]
    targets_T[borders[1:] - 1] = 0  # the last token of a segment predicts nothing
    trajectory_T = np.full(total, -1, dtype=np.int64)
    trajectories = [-1 if segment.sequence is None else segment.sequence.trajectory for segment in segments]
    trajectory_T[:used] = np.repeat(np.array(trajectories, dtype=np.int64), length_S)

    def on_response(values: Iterable[np.ndarray]) -> torch.Tensor:
        packed_T = np.zeros(total, dtype=np.float32)
        if sequences:
            packed_T[mask_T] = np.concatenate(list(values))
        return torch.from_numpy(packed_T)

    def per_sequence(values: Iterable[float]) -> torch.Tensor:
        each = np.fromiter(values, np.float32, len(sequences))
        return on_response([np.repeat(each, [len(sequence.response_ids) for sequence in sequences])])

    return MicroBatch(
        tokens_T=torch.from_numpy(tokens_T),
        position_ids_T=torch.from_numpy(position_T),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        prefixes=[segment.prefix for segment in segments] + [-1] * bool(padding),
        max_seqlen=int(position_T.max()) + 1,
        targets_T=torch.from_numpy(targets_T),
        loss_mask_T=torch.from_numpy(mask_T),
        advantages_T=per_sequence(s.advantage for s in sequences),
        weights_T=per_sequence(s.weight for s in sequences),
        rollout_logprobs_T=on_response(s.rollout_logprobs for s in sequences),
        trajectory_T=torch.from_numpy(trajectory_T),
        response_position_T=torch.from_numpy(response_position_T),
        sources=[segment.label.source for segment in segments],
        regimes=[segment.label.regime for segment in segments],
    )


def _tokens(segment: Segment) -> list[np.ndarray]:
    return [segment.prompt_ids] if segment.sequence is None else [segment.prompt_ids, segment.sequence.response_ids]


def _check_sequence(sequence: PackedSequence) -> None:
    name = f"sequence of trajectory {sequence.trajectory}"
    if len(sequence.prompt_ids) == 0:
        raise ValueError(f"{name} must have at least one prompt token, got none")
    if len(sequence.response_ids) == 0:
        raise ValueError(f"{name} must have at least one response token, got none")
    if len(sequence.rollout_logprobs) != len(sequence.response_ids):
        raise ValueError(
            f"{name} must have one rollout log-prob per response token, got {len(sequence.rollout_logprobs)} for "
            f"{len(sequence.response_ids)} tokens"
        )
    if sequence.trajectory < 0:
        raise ValueError(f"trajectory must be at least 0 (-1 marks padding), got {sequence.trajectory}")


def unpack_responses(values_T: torch.Tensor, microbatch: MicroBatch) -> dict[int, np.ndarray]:
    """Per-response values out of a packed tensor.

    Args:
        values_T: [T] any dtype numpy knows (bfloat16 does not: cast first), one value per packed position.
        microbatch: the packing.

    Returns:
        ``{trajectory: [R]}``, values at the positions that predict the response's tokens, in response order.
    """
    if values_T.shape != microbatch.tokens_T.shape:
        raise ValueError(f"values must have shape {tuple(microbatch.tokens_T.shape)}, got {tuple(values_T.shape)}")
    mask_T = microbatch.loss_mask_T.cpu().numpy()
    packed = values_T.detach().cpu().numpy()[mask_T]
    trajectories = microbatch.trajectory_T.cpu().numpy()[mask_T]
    if len(packed) == 0:
        return {}
    starts = np.flatnonzero(microbatch.response_position_T.cpu().numpy()[mask_T] == 0)
    return {int(trajectories[start]): part for start, part in zip(starts, np.split(packed, starts[1:]), strict=True)}


def split_by_label(values_T: torch.Tensor, microbatch: MicroBatch, labels: Sequence[str]) -> dict[str, torch.Tensor]:
    """Values of the response tokens, by the label of their segment.

    Args:
        values_T: [T], one value per packed position.
        labels: [S] of the micro-batch's segments, padding left out: ``microbatch.sources`` or ``.regimes``.

    Returns:
        Per label, in alphabetical order, its values [tokens of the label] in packing order.
    """
    names = sorted(set(labels))
    index_S = torch.tensor([names.index(label) for label in labels], dtype=torch.int64, device=values_T.device)
    lengths_S = microbatch.cu_seqlens.diff()[: len(labels)].long()
    # Padding, if any, lies behind all sequences.
    index_T = index_S.repeat_interleave(lengths_S)
    masked_T = microbatch.loss_mask_T[: len(index_T)]
    values, index = values_T[: len(index_T)][masked_T], index_T[masked_T]
    return {name: values[index == i] for i, name in enumerate(names)}
