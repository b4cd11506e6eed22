"""Weights against the trainer-engine mismatch: the engine samples from slightly other probabilities than it trains.

The ratio rho = pi_old / pi_engine of what the trainer and the engine gave the sampled tokens, taken over the token,
over the response (product) or as the response's geometric mean, weights the loss by min(rho, cap), or decides whether
a token counts at all, lower <= rho <= upper. The settings combine to what the field calls

    token TIS        weight=token                      truncated importance sampling (Ionides 2008)
    sequence TIS     weight=sequence
    MIS, IcePop      weight=R cap=null reject=R        masked importance sampling; IcePop is R=token (arXiv 2510.18855)
    rejection        reject=token, sequence or geometric

T packed tokens.
"""

from __future__ import annotations

import torch

from megatron_rlvr.config.schema import MismatchConfig, RatioLevel
from megatron_rlvr.metrics import Mean, Metric

LOGRATIO_CLAMP = 20.0
"""Of log rho, so that a product over a long response stays finite."""


def corrects(config: MismatchConfig) -> bool:
    """Whether anything is weighted or rejected."""
    return config.weight is not RatioLevel.none or config.reject is not RatioLevel.none


def importance(
    old_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    mask_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    config: MismatchConfig,
) -> tuple[torch.Tensor | None, dict[str, Metric]]:
    """Importance weights of the tokens, constants to autograd.

    Args:
        old_logprobs_T: fp32 or fp64 [T] nats, trainer, before the updates of this rollout batch.
        rollout_logprobs_T: [T] nats, engine, at sampling.
        mask_T: bool [T] response tokens.
        trajectory_T: int [T] response of each token; responses are whole.

    Returns:
        fp32 or fp64 [T], 0 for rejected tokens and 1 outside the mask, None where nothing is corrected; and
        ``mismatch/weight_mean``, ``mismatch/truncated_fraction``, ``mismatch/rejected_fraction`` over tokens.
    """
    if not corrects(config):
        return None, {}
    logratio_T = torch.where(mask_T, old_logprobs_T.detach() - rollout_logprobs_T, 0.0)
    weights_T = torch.ones_like(logratio_T)
    num_tokens = float(mask_T.sum())
    metrics: dict[str, Metric] = {}
    if config.weight is not RatioLevel.none:
        weights_T = ratio_of(logratio_T, mask_T, trajectory_T, config.weight)
        if config.cap is not None:
            over_T = (weights_T > config.cap) & mask_T
            metrics["mismatch/truncated_fraction"] = Mean(float(over_T.sum()), num_tokens)
            weights_T = weights_T.clamp(max=config.cap)
    if config.reject is not RatioLevel.none:
        ratio_T = ratio_of(logratio_T, mask_T, trajectory_T, config.reject)
        out_T = ((ratio_T < config.lower) | (ratio_T > config.upper)) & mask_T
        metrics["mismatch/rejected_fraction"] = Mean(float(out_T.sum()), num_tokens)
        weights_T = torch.where(out_T, 0.0, weights_T)
    weights_T = torch.where(mask_T, weights_T, 1.0)
    metrics["mismatch/weight_mean"] = Mean(float(weights_T[mask_T].double().sum()), num_tokens)
    return weights_T, metrics


def ratio_of(
    logratio_T: torch.Tensor, mask_T: torch.Tensor, trajectory_T: torch.Tensor, level: RatioLevel
) -> torch.Tensor:
    """rho of every token at a level, its log clamped to +-20; 1 outside the mask.

    Args:
        logratio_T: fp32 or fp64 [T], log pi_old - log pi_engine.
    """
    if level is not RatioLevel.token:
        sums_S, counts_S, index_M = response_sums(logratio_T, mask_T, trajectory_T)
        values_S = sums_S / counts_S if level is RatioLevel.geometric else sums_S
        spread_T = torch.zeros_like(logratio_T)
        spread_T[mask_T] = values_S[index_M].to(logratio_T.dtype)
        logratio_T = spread_T
    return torch.where(mask_T, logratio_T, 0.0).clamp(-LOGRATIO_CLAMP, LOGRATIO_CLAMP).exp()


def response_sums(
    values_T: torch.Tensor, mask_T: torch.Tensor, trajectory_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp64 sums and counts [S] of the masked tokens of every response, and the response of every masked token."""
    masked_M = values_T[mask_T].double()
    _, index_M = trajectory_T[mask_T].unique(return_inverse=True)
    counts_S = torch.bincount(index_M).double()
    sums_S = torch.zeros_like(counts_S).index_add_(0, index_M, masked_M)
    return sums_S, counts_S, index_M
