"""KL-Cov, arXiv 2505.22617: the tokens with the highest covariance pay a KL penalty."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES, LossTokens, fused
from megatron_rlvr.metrics import Metric


@LOSSES.register("kl_cov")
def kl_cov(tokens: LossTokens, config: LossConfig) -> tuple[torch.Tensor, dict[str, Metric]]:
    """-A r, plus beta times a KL term of the log ratio on the selected tokens; no ratio clip."""
    return fused(
        tokens,
        "kl_cov",
        beta=config.kl_cov.beta,
        kl=config.kl_cov.kl.value,
        logratio_clamp=config.logratio_clamp,
    )
