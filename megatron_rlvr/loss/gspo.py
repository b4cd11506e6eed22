"""Group Sequence Policy Optimization, arXiv 2507.18071, in its token form (section 4.3 there)."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES, LossTokens, fused
from megatron_rlvr.metrics import Metric


@LOSSES.register("gspo")
def gspo(tokens: LossTokens, config: LossConfig) -> tuple[torch.Tensor, dict[str, Metric]]:
    """PPO's surrogate of s, the geometric mean of a response's token ratios; its gradient is s times that of log pi."""
    return fused(
        tokens,
        "gspo",
        eps_low=config.gspo.eps_low,
        eps_high=config.gspo.eps_high,
        dual_clip=config.dual_clip,
        logratio_clamp=config.logratio_clamp,
    )
