"""Metrics of an update: mismatch with the engine, entropy, covariance, what was left out.

T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.distributed as dist

from megatron_rlvr import ops
from megatron_rlvr.data.packing import split_by_label
from megatron_rlvr.loss.mismatch import LOGRATIO_CLAMP, response_sums
from megatron_rlvr.metrics import EffectiveShare, Max, Mean, Metric, Min, Sum, merge
from megatron_rlvr.policy.policy import LogprobPass
from megatron_rlvr.trainer.update.batch import ProbeScale, UpdateBatch
from megatron_rlvr.trainer.update.selection import JoinedTokens
from megatron_rlvr.types import MicroBatch

TOP_SHARES = (
    ("q50", "top50", Fraction(1, 2)),
    ("q80", "top20", Fraction(1, 5)),
    ("q98", "top2", Fraction(1, 50)),
    ("q998", "top02", Fraction(1, 500)),
    ("q9998", "top002", Fraction(1, 5000)),
)
"""Names of quantile and share: the shares of tokens in the paper's Table 1, 50% to 0.02%."""


def saving_metrics(updates: Sequence[UpdateBatch]) -> dict[str, Metric]:
    """Packed tokens that had no backward pass, how many of these had a forward pass for the metrics, and how many more
    there would be if the responses of a group did not share their prompt."""
    used, probed, idle = (
        float(sum(micro.num_tokens for part in parts for micro in part))
        for parts in ([u.micro_batches for u in updates], [u.probed for u in updates], [u.idle for u in updates])
    )
    return {
        "update/elided_fraction": Mean(probed + idle, used + probed + idle),
        "update/tokens_saved": Sum(probed + idle),
        "update/tokens_probed": Sum(probed),
        "update/prompt_tokens_shared": Sum(
            float(sum(micro.num_shared_tokens for u in updates for micro in (*u.micro_batches, *u.probed)))
        ),
    }


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> Mean:
    """Mean over the masked tokens, in fp64."""
    masked = values_T[mask_T].double()
    return Mean(float(masked.sum()), float(masked.numel()))


def pass_metrics(
    micro_batches: Sequence[MicroBatch], once: LogprobPass, scale: ProbeScale | None = None
) -> dict[str, Metric]:
    """What one pass over micro-batches tells of entropy and mismatch.

    Args:
        scale: for a sample of the elided responses, how many each one stands for.
    """
    scale = scale or ProbeScale()
    parts = []
    for micro, logprobs_T, entropy_T in zip(micro_batches, once.logprobs, once.entropy, strict=True):
        if micro.loss_mask_T.any():
            parts.append(_mismatch_metrics(micro, logprobs_T, scale) | _entropy_metrics(micro, entropy_T, scale))
    # Without a single token they are unknown, not absent.
    nothing = Mean(0.0, 0.0)
    return merge([{"entropy/mean": nothing, "rollout/logprob_diff_mean": nothing}, *parts])


def _mismatch_metrics(micro: MicroBatch, logprobs_T: torch.Tensor, scale: ProbeScale) -> dict[str, Metric]:
    """How far the trainer's log-probs are from the engine's on the sampled tokens.

    k1 and k3 estimate KL(engine || trainer) in nats, since the engine has sampled; ratios are trainer / engine.
    """
    mask_T = micro.loss_mask_T
    log_M = (logprobs_T - micro.rollout_logprobs_T)[mask_T].double()
    clamped_M = log_M.clamp(-LOGRATIO_CLAMP, LOGRATIO_CLAMP)
    ratio_M = clamped_M.exp()
    sums_S, counts_S, _ = response_sums(logprobs_T - micro.rollout_logprobs_T, mask_T, micro.trajectory_T)
    ratio_S = sums_S.clamp(-LOGRATIO_CLAMP, LOGRATIO_CLAMP).exp()
    return {
        "rollout/logprob_diff_mean": _scaled_mean(log_M.abs(), scale.tokens),
        "rollout/logprob_diff_max": Max(float(log_M.abs().max())),
        "mismatch/kl_k1": _scaled_mean(-log_M, scale.tokens),
        "mismatch/kl_k3": _scaled_mean(clamped_M.expm1() - clamped_M, scale.tokens),
        "mismatch/ratio_mean": _scaled_mean(ratio_M, scale.tokens),
        "mismatch/ratio_max": Max(float(ratio_M.max())),
        "mismatch/ratio_min": Min(float(ratio_M.min())),
        "mismatch/ess_token": _effective(ratio_M, scale.tokens),
        "mismatch/ess_response": _effective(ratio_S, scale.responses),
        # Of the trainer's to the engine's perplexity, response by response.
        "mismatch/ppl_ratio": _scaled_mean((-sums_S / counts_S).exp(), scale.responses),
    }


def _entropy_metrics(micro: MicroBatch, entropy_T: torch.Tensor, scale: ProbeScale) -> dict[str, Metric]:
    """Entropy as mean over response tokens, and as mean over responses of their token mean (spec C3), in nats.

    The token mean also by sign of the advantage and by data source.
    """
    sums_S, counts_S, _ = response_sums(entropy_T, micro.loss_mask_T, micro.trajectory_T)
    metrics: dict[str, Metric] = {
        "entropy/mean": Mean(float(sums_S.sum()) * scale.tokens, float(counts_S.sum()) * scale.tokens),
        "entropy/sequence_mean": _scaled_mean(sums_S / counts_S, scale.responses),
    }
    for name, sign in (("positive", micro.advantages_T > 0), ("negative", micro.advantages_T < 0)):
        metrics[f"entropy/{name}_advantage"] = masked_mean(entropy_T, micro.loss_mask_T & sign)
    for source, of_source in split_by_label(entropy_T, micro, micro.sources).items():
        metrics[f"entropy/mean/{source}"] = _scaled_mean(of_source.double(), scale.tokens)
    return metrics


def sampled_entropy_metrics(micro_batches: Sequence[MicroBatch]) -> dict[str, Metric]:
    """-log pi of the sampled tokens by the engine, over all responses: its mean estimates the entropy for nothing."""
    return merge(
        {"entropy/sampled_mean": masked_mean(-micro.rollout_logprobs_T, micro.loss_mask_T)} for micro in micro_batches
    )


def _scaled_mean(values: torch.Tensor, scale: float) -> Mean:
    return Mean(float(values.sum()) * scale, float(values.numel()) * scale)


def _effective(weights: torch.Tensor, scale: float) -> EffectiveShare:
    return EffectiveShare(
        float(weights.sum()) * scale, float(weights.square().sum()) * scale, float(weights.numel()) * scale
    )


def covariance_metrics(micro_batches: Sequence[MicroBatch], group: dist.ProcessGroup | None) -> dict[str, Metric]:
    """Batch covariance of log-prob and advantage over all response tokens (spec B1), collective over `group`."""
    join = JoinedTokens.of(micro_batches)
    covariance = ops.token_covariance(join.old_logprobs_T, join.advantages_T, join.mask_T, group=group)
    masked = covariance.cov_T[join.mask_T]
    metrics: dict[str, Metric] = {"cov/mean": masked_mean(covariance.cov_T, join.mask_T)}
    if masked.numel():
        metrics["cov/max"] = Max(float(masked.max()))
    return metrics | _covariance_quantiles(masked, group)


def _covariance_quantiles(cov_N: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, Metric]:
    """Table 1 of Cui et al. 2505.22617: the mean covariance of the top tokens, and the quantiles they begin at."""
    metrics: dict[str, Metric] = {}
    tops = ops.top_shares(cov_N[torch.isfinite(cov_N)], [share for _, _, share in TOP_SHARES], group=group)
    for (quantile, top, _), found in zip(TOP_SHARES, tops, strict=True):
        metrics[f"cov/{quantile}"] = Max(found.threshold)
        metrics[f"cov/{top}_mean"] = Max(found.mean)
    return metrics
