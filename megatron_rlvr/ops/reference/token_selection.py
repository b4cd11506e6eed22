"""Exact global token selection of Clip-Cov and KL-Cov (spec B1, B3-B5).

What decides is made of integers or of correctly rounded numbers, so that the selected set is bitwise the same
for any number of ranks, any micro-batch split and any packing: the sums behind the means are exact fixed-point
numbers, Cov is rounded to float32 once per token, and ties are broken by (trajectory, position).
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist

from megatron_rlvr.ops.backend import register
from megatron_rlvr.ops.covariance import TokenCovariance, covariance_from_sums
from megatron_rlvr.ops.exact import NUM_LIMBS, exact_sum_limbs, limbs_to_fraction, selection_count

MASK64 = (1 << 64) - 1
SIGN_BIT = -(1 << 63)


@register("token_covariance", backend="reference")
def token_covariance(
    logprobs_T: torch.Tensor, advantages_T: torch.Tensor, mask_T: torch.Tensor, *, group: dist.ProcessGroup | None
) -> TokenCovariance:
    """See `megatron_rlvr.ops.token_covariance`."""
    logprobs_N = logprobs_T.detach()[mask_T].double()
    advantages_N = advantages_T.detach()[mask_T].double()
    finite_N = logprobs_N.isfinite() & advantages_N.isfinite() & (logprobs_N * advantages_N).isfinite()
    num_bad = int((~finite_N).sum())
    if num_bad:
        # The bad count travels with the sums, so that every rank raises instead of one leaving the others waiting.
        logprobs_N, advantages_N = logprobs_N[finite_N], advantages_N[finite_N]
    packed = torch.cat(
        [
            torch.tensor([mask_T.sum(), num_bad], dtype=torch.int64),
            exact_sum_limbs(logprobs_N),
            exact_sum_limbs(advantages_N),
            exact_sum_limbs(logprobs_N * advantages_N),
        ]
    ).to(logprobs_T.device)
    if group is not None:
        dist.all_reduce(packed, group=group)
    num_tokens, num_bad = (int(count) for count in packed[:2].tolist())
    if num_bad:
        raise ValueError(f"logprobs_T and advantages_T must be finite on masked tokens, got {num_bad} that are not")
    sums = packed[2:].cpu().view(3, NUM_LIMBS)
    return covariance_from_sums(
        logprobs_T,
        advantages_T,
        mask_T,
        num_tokens=num_tokens,
        logprob_sum=limbs_to_fraction(sums[0]),
        advantage_sum=limbs_to_fraction(sums[1]),
        product_sum=limbs_to_fraction(sums[2]),
    )


@register("select_tokens", backend="reference")
def select_tokens(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    method: str,
    ratio: Fraction,
    lower: float,
    upper: float,
    excluded_T: torch.Tensor | None,
    trajectory_T: torch.Tensor,
    position_T: torch.Tensor,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """See `megatron_rlvr.ops.select_tokens`."""
    covariance = token_covariance(logprobs_T, advantages_T, mask_T, group=group)
    count = selection_count(ratio, covariance.num_tokens)
    cov_T = covariance.cov_T.float()
    token_id_T = (trajectory_T.long() << 32) | position_T.long()
    if method == "kl_cov":
        candidate_T = mask_T
        # Smallest first: a larger Cov has a larger ordered key, hence a smaller complement.
        key_T = MASK32 - ordered_key(cov_T)
    else:
        # Compared as doubles: the float32 Cov against the bounds as written.
        candidate_T = mask_T & (cov_T.double() > lower) & (cov_T.double() < upper)
        key_T = selection_key(token_id_T, seed=seed, step=step)
    if excluded_T is not None:
        candidate_T = candidate_T & ~excluded_T
    return _smallest(key_T, token_id_T, candidate_T, count=count, group=group)


MASK32 = (1 << 32) - 1


def ordered_key(values_T: torch.Tensor) -> torch.Tensor:
    """Order-preserving unsigned key of float32 values, -0.0 counted as 0.0 (spec B5).

    Returns:
        int64 [T] in [0, 2**32).
    """
    bits_T = (values_T + 0.0).view(torch.int32).long() & MASK32
    negative_T = bits_T >> 31 == 1
    return torch.where(negative_T, MASK32 - bits_T, bits_T | 0x80000000)


def selection_key(token_id_T: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    """mix(mix(mix(seed) xor step) xor token_id) with splitmix64's mix (spec B0, B5), order-preserving in int64.

    Returns:
        int64 [T]: the unsigned 64-bit key with its top bit flipped, so that signed order is the key's order.
    """
    stream = mix64(mix64(seed) ^ step)
    return _mix64_tensor(token_id_T ^ _as_signed(stream)) ^ SIGN_BIT


def mix64(value: int) -> int:
    """splitmix64's output function on an unsigned 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def _mix64_tensor(value_T: torch.Tensor) -> torch.Tensor:
    """`mix64` on int64 tensors, whose products wrap as unsigned ones do."""
    value_T = value_T + _as_signed(0x9E3779B97F4A7C15)
    value_T = (value_T ^ _shift_right(value_T, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    value_T = (value_T ^ _shift_right(value_T, 27)) * _as_signed(0x94D049BB133111EB)
    return value_T ^ _shift_right(value_T, 31)


def _shift_right(value_T: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (value_T >> bits) & ((1 << (64 - bits)) - 1)


def _as_signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _smallest(
    key_T: torch.Tensor,
    token_id_T: torch.Tensor,
    candidate_T: torch.Tensor,
    *,
    count: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Marks the ``count`` candidates with the smallest (key, token id) over all ranks of the group."""
    index_C = candidate_T.nonzero()[:, 0]
    order_C = _lexicographic_order(key_T[index_C], token_id_T[index_C])[:count]
    best_C2 = torch.stack([key_T[index_C[order_C]], token_id_T[index_C[order_C]]], dim=1)
    best_C2 = _gather_rows(best_C2, group)
    selected_T = torch.zeros_like(candidate_T)
    if len(best_C2) == 0 or count == 0:
        return selected_T
    last = _lexicographic_order(best_C2[:, 0], best_C2[:, 1])[:count][-1]
    last_key, last_id = best_C2[last]
    return candidate_T & ((key_T < last_key) | ((key_T == last_key) & (token_id_T <= last_id)))


def _lexicographic_order(key_C: torch.Tensor, token_id_C: torch.Tensor) -> torch.Tensor:
    """Indices that sort by key, then by token id."""
    by_id_C = torch.argsort(token_id_C, stable=True)
    return by_id_C[torch.argsort(key_C[by_id_C], stable=True)]


def _gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Rows of all ranks, whose numbers may differ."""
    if group is None:
        return rows
    world_size = dist.get_world_size(group)
    lengths = rows.new_zeros(world_size)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(rows)], device=rows.device), group=group)
    longest = int(lengths.max())
    if longest == 0:
        return rows
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(world_size * longest, rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    parts = gathered.view(world_size, longest, rows.shape[1])
    return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])
