"""KL to the frozen reference model, per token."""

from __future__ import annotations

import torch

from megatron_rlvr.config.schema import KlKind

LOGRATIO_CLAMP = 20.0


def reference_kl(
    logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, mask_T: torch.Tensor, *, kind: KlKind | str
) -> torch.Tensor:
    """Estimates of KL(pi || ref) on tokens sampled from pi, with d = log ref - log pi clamped to +-20.

    k1 = -d (unbiased), k2 = d^2 / 2, k3 = e^d - 1 - d (unbiased and never negative), abs = |d|
    (joschu.net/blog/kl-approx.html). As a loss, differentiated through log pi alone, k2's gradient is the one
    that estimates the gradient of KL(pi || ref); k1's has expectation 0 and k3's is that of KL(ref || pi).

    Args:
        logprobs_T: fp32 or fp64 [T] nats, current policy, with gradient.
        ref_logprobs_T: [T] nats, reference.
        mask_T: bool [T].
        kind: estimator, the enum or its name.

    Returns:
        [T] nats, 0 outside the mask.

    Raises:
        ValueError: unknown kind.
    """
    kind = KlKind(kind)
    difference_T = torch.where(mask_T, ref_logprobs_T.detach(), 0.0) - torch.where(mask_T, logprobs_T, 0.0)
    difference_T = difference_T.clamp(-LOGRATIO_CLAMP, LOGRATIO_CLAMP)
    if kind is KlKind.k1:
        return -difference_T
    if kind is KlKind.k2:
        return difference_T.square() / 2
    if kind is KlKind.abs:
        return difference_T.abs()
    return torch.expm1(difference_T) - difference_T
