"""Log-prob and entropy together with second moments of the policy, from the same read of the logits (spec D3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.ops.backend import implementation
from megatron_rlvr.ops.checks import INTEGER_DTYPES, LOGIT_DTYPES, check_positive, check_same_length, check_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabMoments:
    """What one read of the logits says about every token's distribution p; nothing carries a gradient.

    Example:
        >>> moments = vocab_parallel_moments(logits_TV, targets_T)
        >>> moments.sum_p2_T  # probability that two draws agree
    """

    logprobs_T: torch.Tensor
    """fp32 [T] (fp64 for fp64 logits), nats."""
    entropy_T: torch.Tensor
    """fp32 [T] (fp64 for fp64 logits), nats."""
    sum_p2_T: torch.Tensor
    """fp64 [T], sum_j p_j^2."""
    sum_p2_logp_T: torch.Tensor
    """fp64 [T], S2 = sum_j p_j^2 (log p_j + H), nats: how entropy moves along p itself."""


def vocab_parallel_moments(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> VocabMoments:
    """Log-prob, entropy and second moments of softmax(logits / temperature), the vocabulary split over ``group``.

    One all-gather of six numbers a token (spec D2, D3).

    Args:
        logits_TV: bf16, fp16, fp32 or fp64 [T, V] of this rank's shard; shards follow one another in rank order.
        targets_T: int64 or int32 [T] ids in the whole vocabulary.
        temperature: divides the logits after the upcast to fp32.
        group: process group of the shards; None for an unsharded vocabulary.

    Raises:
        TypeError, ValueError: as `vocab_parallel_logprob_entropy`.
    """
    check_tensor(logits_TV, name="logits_TV", dims=2, dtypes=LOGIT_DTYPES)
    check_tensor(targets_T, name="targets_T", dims=1, dtypes=INTEGER_DTYPES)
    check_same_length(logits_TV.shape[0], targets_T=targets_T)
    temperature = check_positive(temperature, name="temperature")
    with torch.no_grad():
        outputs, statistics_RT6 = implementation("vocab_parallel_moments")(
            logits_TV, targets_T, temperature=temperature, group=group
        )
        sum_p2_T, sum_p2_logp_T = merge_second_moments(statistics_RT6)
    return VocabMoments(logprobs_T=outputs[0], entropy_T=outputs[1], sum_p2_T=sum_p2_T, sum_p2_logp_T=sum_p2_logp_T)


def merge_second_moments(statistics_RT6: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum p^2 and sum p^2 (log p + H) from all shards' statistics, added in rank order (spec D3).

    Args:
        statistics_RT6: fp64 [R, T, 6]: max, S, W, target, Q = sum e^2, U = sum (x - max) e^2.
    """
    max_T = statistics_RT6[:, :, 0].amax(dim=0)
    total_T, weighted_T, squares_T, weighted_squares_T = (torch.zeros_like(max_T) for _ in range(4))
    for shard_T6 in statistics_RT6:
        shard_max_T, sum_T, mean_T, _, q_T, u_T = shard_T6.unbind(dim=1)
        # A fully masked shard has nothing to add; -inf - M would only be carried along as 0 * -inf.
        offset_T = torch.where(shard_max_T == -torch.inf, 0.0, shard_max_T - max_T)
        factor_T = offset_T.exp()
        total_T += sum_T * factor_T
        weighted_T += (mean_T + offset_T * sum_T) * factor_T
        squares_T += q_T * factor_T**2
        weighted_squares_T += (u_T + offset_T * q_T) * factor_T**2
    return squares_T / total_T**2, (weighted_squares_T - squares_T * weighted_T / total_T) / total_T**2
