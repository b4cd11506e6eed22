"""PPO's clipped surrogate (arXiv 1707.06347) with DAPO's clip-higher (2503.14476) and dual clip (1912.09729)."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES
from megatron_rlvr.metrics import Metric
from megatron_rlvr.ops import policy_loss


@LOSSES.register("ppo")
def ppo(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    selected_T: torch.Tensor | None,
    config: LossConfig,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)), at most -A dual_clip where A < 0."""
    return policy_loss(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        loss="ppo",
        selected_T=selected_T,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
        dual_clip=config.dual_clip,
        logratio_clamp=config.logratio_clamp,
    )
