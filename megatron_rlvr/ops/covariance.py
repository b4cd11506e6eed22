"""Covariance of token log-probs and advantages, with the means taken over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass(kw_only=True, slots=True)
class TokenCovariance:
    """Token covariances and their statistics over all tokens of the group.

    Example:
        >>> covariance = token_covariance(logprobs_T, advantages_T, mask_T, group=dp_group)
        >>> covariance.mean          # estimates -dH/d(eta) of a policy-gradient step (spec C3, P1)
    """

    cov_T: torch.Tensor
    """float64 [T] (log pi - mean log pi) (A - mean A) on masked tokens, 0 elsewhere."""
    num_tokens: int
    """N, masked tokens over the group."""
    mean_logprob: float
    """nats; NaN without tokens."""
    mean_advantage: float
    mean: float
    """Mean of Cov over the group's tokens: the batch covariance of log-prob and advantage."""


def covariance_from_sums(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    num_tokens: int,
    logprob_sum: Fraction,
    advantage_sum: Fraction,
    product_sum: Fraction,
) -> TokenCovariance:
    """Token covariances from exact sums; every mean is rounded once."""
    if num_tokens == 0:
        zeros_T = torch.zeros_like(logprobs_T, dtype=torch.float64)
        return TokenCovariance(
            cov_T=zeros_T, num_tokens=0, mean_logprob=math.nan, mean_advantage=math.nan, mean=math.nan
        )
    mean_logprob = float(logprob_sum / num_tokens)
    mean_advantage = float(advantage_sum / num_tokens)
    mean = float(product_sum / num_tokens - (logprob_sum / num_tokens) * (advantage_sum / num_tokens))
    cov_T = (logprobs_T.detach().double() - mean_logprob) * (advantages_T.detach().double() - mean_advantage)
    return TokenCovariance(
        cov_T=torch.where(mask_T, cov_T, 0.0),
        num_tokens=num_tokens,
        mean_logprob=mean_logprob,
        mean_advantage=mean_advantage,
        mean=mean,
    )
