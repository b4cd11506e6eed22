"""KL-Cov, arXiv 2505.22617: the tokens with the highest covariance pay a KL penalty."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES
from megatron_rlvr.metrics import Metric
from megatron_rlvr.ops import policy_loss


@LOSSES.register("kl_cov")
def kl_cov(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    selected_T: torch.Tensor | None,
    config: LossConfig,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """-A r, plus beta times a KL term of the log ratio on the selected tokens; no ratio clip."""
    return policy_loss(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        loss="kl_cov",
        selected_T=selected_T,
        beta=config.kl_cov.beta,
        kl=config.kl_cov.kl.value,
        logratio_clamp=config.logratio_clamp,
    )
