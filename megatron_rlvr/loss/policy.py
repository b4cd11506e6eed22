"""The registry of policy losses, and what a loss sees of a micro-batch.

T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_rlvr import ops
from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.metrics import Metric
from megatron_rlvr.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """Packed tokens of one micro-batch.

    Example:
        >>> loss, metrics = LOSSES.get("ppo")(tokens, config)
        >>> loss.backward()
    """

    logprobs_T: torch.Tensor
    """fp32 [T] nats, current policy, with gradient."""
    old_logprobs_T: torch.Tensor
    """fp32 [T] nats, policy before the updates of this rollout batch."""
    advantages_T: torch.Tensor
    """fp32 [T]."""
    mask_T: torch.Tensor
    """bool [T] response tokens; elsewhere the others may hold anything."""
    weights_T: torch.Tensor
    """fp32 [T] aggregation weights, with denominators over the whole optimizer step inside."""
    trajectory_T: torch.Tensor
    """int64 [T] response of each token; a response is whole within its micro-batch."""
    importance_T: torch.Tensor | None = None
    """fp32 [T] weights against the trainer-engine mismatch, constants; None for 1 throughout."""
    selected_T: torch.Tensor | None = None
    """bool [T] tokens that a covariance loss acts on, None for the others."""

    def aggregate(self, loss_T: torch.Tensor) -> torch.Tensor:
        """fp64 scalar, the sum of weight x importance x loss; for losses that are not one of the fused op's."""
        scale_T = self.weights_T.double()
        if self.importance_T is not None:
            scale_T = scale_T * self.importance_T.double()
        return (torch.where(self.mask_T, loss_T.double(), 0.0) * torch.where(self.mask_T, scale_T, 0.0)).sum()


PolicyLoss = Callable[[LossTokens, LossConfig], tuple[torch.Tensor, dict[str, Metric]]]
"""From tokens to the aggregated loss, an fp64 scalar differentiable in ``logprobs_T``, and metrics. A loss reads its
own part of the section."""

LOSSES: Registry[PolicyLoss] = Registry("loss.name")


def fused(tokens: LossTokens, name: str, **options: float | str | None) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The loss called `name` of the fused op, `megatron_rlvr.ops.aggregated_policy_loss`."""
    return ops.aggregated_policy_loss(
        tokens.logprobs_T,
        tokens.old_logprobs_T,
        tokens.advantages_T,
        tokens.mask_T,
        weights_T=tokens.weights_T,
        importance_T=tokens.importance_T,
        loss=name,
        selected_T=tokens.selected_T,
        trajectory_T=tokens.trajectory_T if name == "gspo" else None,
        **options,
    )
