"""A policy loss that is not finite now and then; named by its path in test_resume_run.py."""

from __future__ import annotations

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss import LOSSES, LossTokens
from megatron_rlvr.metrics import Metric

NAN_LOSS, NAN_GRADIENT = (2, 5), (4,)
step = 0
"""Kept by interrupted_rank.py."""


def ppo_with_holes(tokens: LossTokens, config: LossConfig) -> tuple[torch.Tensor, dict[str, Metric]]:
    """PPO; its value is not a number in some steps, its gradient alone in others."""
    loss, metrics = LOSSES.get("ppo")(tokens, config)
    if step in NAN_LOSS:
        loss = loss * torch.nan
    if step in NAN_GRADIENT:
        loss = loss + (tokens.logprobs_T - tokens.logprobs_T.detach()).abs().sqrt().sum()
    return loss, metrics
