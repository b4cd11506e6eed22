"""The registry of policy losses."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.metrics import Metric
from megatron_rlvr.registry import Registry


class PolicyLoss(Protocol):
    """Per-token loss, not aggregated."""

    def __call__(
        self,
        logprobs_T: torch.Tensor,
        old_logprobs_T: torch.Tensor,
        advantages_T: torch.Tensor,
        mask_T: torch.Tensor,
        *,
        selected_T: torch.Tensor | None,
        config: LossConfig,
    ) -> tuple[torch.Tensor, dict[str, Metric]]:
        """Losses fp32 [T], 0 outside the mask and differentiable in ``logprobs_T``, and metrics.

        Args:
            logprobs_T: fp32 [T] nats, current policy.
            old_logprobs_T: fp32 [T] nats, policy before the updates of this rollout batch.
            advantages_T: fp32 [T].
            mask_T: bool [T] response tokens.
            selected_T: bool [T] tokens that a covariance loss acts on, None for the others.
            config: the loss section; a loss reads its own part.
        """
        ...


LOSSES: Registry[PolicyLoss] = Registry("loss.name")
