"""Where responses with zero advantage may stay out of an update, and what stands in for them (spec A10).

A token of zero advantage adds exactly nothing to the gradient of the built-in losses, KL-Cov's penalty excepted. What
the others need of it stays: its part of the denominators, which are in the weights; its part of the group's statistics,
which are in the advantages; and, where tokens are chosen by covariance, its log-prob in the means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlvr.config.schema import CovLogp, CovScope, Elision, LossConfig, TrainConfig
from megatron_rlvr.loss import LOSSES
from megatron_rlvr.trainer.update.selection import COVARIANCE_LOSSES


@dataclass(frozen=True, kw_only=True, slots=True)
class ElisionPlan:
    """Whether responses with zero advantage stay out of an update."""

    reason: str | None
    """Why they do not; None where they do."""
    probed_share: float
    """Share of the elided responses that have a forward pass without gradient."""

    @property
    def is_on(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return "out of the update" if self.is_on else f"in the update: {self.reason}"


def plan_elision(train: TrainConfig, loss: LossConfig, *, has_auxiliary_loss: bool) -> ElisionPlan:
    """What `train.elide_zero_advantage` comes to with this loss and model.

    Raises:
        ValueError: elision is demanded where it is not exact.
    """
    mode = train.elide_zero_advantage
    if mode is Elision.never:
        return ElisionPlan(reason="train.elide_zero_advantage=never", probed_share=0.0)
    demanded = mode is Elision.always
    reason = whole_batch_reason(loss, has_auxiliary_loss=has_auxiliary_loss, substitute=demanded)
    if demanded and reason is not None:
        raise ValueError(f"train.elide_zero_advantage must be auto or never here, got 'always': {reason}")
    # Where tokens are chosen by covariance, exactness takes the trainer's log-probs of all responses into the means.
    in_means = loss.name in COVARIANCE_LOSSES and not demanded
    return ElisionPlan(reason=reason, probed_share=1.0 if in_means else train.elided_metrics_share)


def whole_batch_reason(loss: LossConfig, *, has_auxiliary_loss: bool, substitute: bool = False) -> str | None:
    """Why the gradient needs the tokens of zero advantage too; None where it does not.

    Args:
        has_auxiliary_loss: whether the model adds a loss of its own over all tokens (balance of experts).
        substitute: let the engine's log-probs of these tokens stand for the trainer's in the means of covariances.

    Example:
        >>> whole_batch_reason(LossConfig(entropy_coef=0.01), has_auxiliary_loss=False)
        'the entropy bonus (loss.entropy_coef) has a gradient on all tokens'
    """
    if loss.kl_coef != 0.0:
        return "the KL to the reference model (loss.kl_coef) has a gradient on all tokens"
    if loss.entropy_coef != 0.0:
        return "the entropy bonus (loss.entropy_coef) has a gradient on all tokens"
    if has_auxiliary_loss:
        return "the model's auxiliary loss counts the routing of all tokens"
    if loss.name not in LOSSES:
        return f"loss.name={loss.name} is not built in, so that its gradient at zero advantage is not known"
    if loss.name not in COVARIANCE_LOSSES:
        return None
    if loss.cov_scope is CovScope.micro:
        return "loss.cov_scope=micro takes means and counts of all tokens of a micro-batch"
    if loss.name == "kl_cov" and not loss.kl_cov.skip_zero_advantage:
        return (
            "KL-Cov's penalty falls on tokens of zero advantage too (loss.kl_cov.skip_zero_advantage=true keeps it off)"
        )
    if loss.cov_logp is CovLogp.current and not substitute:
        return "loss.cov_logp=current takes means of the current log-probs of all tokens"
    return None


def systematic_sample(count: int, share: float) -> list[int]:
    """Indices of about `share` of `count` items, evenly spaced, one at least where anything is asked for.

    Responses lie group after group, so that every part of the batch is represented in proportion.
    """
    wanted = min(count, math.ceil(share * count - 1e-9))
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]
