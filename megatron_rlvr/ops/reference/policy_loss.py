"""Per-token policy losses and their metrics (spec B3, B4, E1).

lr = log pi - log pi_old clamped to +-logratio_clamp, r = e^lr; outside the clamp the gradient is 0. At r equal to
a clip bound the unclipped branch keeps its gradient. Everything outside the mask is 0, whatever the inputs hold
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rlvr.metrics import Max, Mean, Metric
from megatron_rlvr.ops.backend import register

Options = dict[str, float | str | None]
Metrics = dict[str, Metric]


@dataclass(kw_only=True, slots=True)
class _Terms:
    """What every loss starts from, fp32 (fp64 for fp64 log-probs), 0 outside the mask."""

    logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    raw_logratio_T: torch.Tensor
    logratio_T: torch.Tensor
    """Clamped."""


@register("policy_loss", backend="reference")
def policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    loss: str,
    selected_T: torch.Tensor | None,
    trajectory_T: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, Metrics]:
    """See `megatron_rlvr.ops.policy_loss`; ``options`` is complete and checked."""
    terms = _terms(logprobs_T, old_logprobs_T, advantages_T, mask_T, clamp=_number(options, "logratio_clamp"))
    metrics = _ratio_metrics(terms)
    if loss == "ppo":
        loss_T, more = _ppo(terms, terms.logratio_T, options)
    elif loss == "gspo":
        assert trajectory_T is not None, "the face checks that gspo comes with trajectories"
        loss_T, more = _ppo(terms, _sequence_logratio(terms, trajectory_T, options), options)
    elif loss == "cispo":
        loss_T, more = _cispo(terms, options)
    else:
        assert selected_T is not None, "the face checks that the covariance losses come with a selection"
        chosen_T = selected_T & mask_T
        loss_T, more = (_clip_cov if loss == "clip_cov" else _kl_cov)(terms, chosen_T, options)
        metrics |= _selection_metrics(terms, chosen_T)
    return torch.where(mask_T, loss_T, 0.0), metrics | more


@register("aggregated_policy_loss", backend="reference")
def aggregated_policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    weights_T: torch.Tensor,
    importance_T: torch.Tensor | None,
    loss: str,
    selected_T: torch.Tensor | None,
    trajectory_T: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, Metrics]:
    """See `megatron_rlvr.ops.aggregated_policy_loss`."""
    loss_T, metrics = policy_loss(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        loss=loss,
        selected_T=selected_T,
        trajectory_T=trajectory_T,
        options=options,
    )
    scale_T = weights_T.detach().double()
    if importance_T is not None:
        scale_T = scale_T * importance_T.detach().double()
    # Outside the mask weights may hold anything too.
    return (loss_T.double() * torch.where(mask_T, scale_T, 0.0)).sum(), metrics


@register("ratio_clipped", backend="reference")
def ratio_clipped(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
    logratio_clamp: float,
) -> torch.Tensor:
    """See `megatron_rlvr.ops.ratio_clipped`."""
    terms = _terms(logprobs_T.detach(), old_logprobs_T, advantages_T, mask_T, clamp=logratio_clamp)
    _, clipped_T = _clipped_surrogate(terms, terms.logratio_T, {"eps_low": eps_low, "eps_high": eps_high})
    return clipped_T


def _terms(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    clamp: float,
) -> _Terms:
    dtype = torch.float64 if logprobs_T.dtype == torch.float64 else torch.float32
    # Masked before any arithmetic: garbage or infinities there must not become NaN gradients.
    logprobs_T = torch.where(mask_T, logprobs_T, 0.0).to(dtype)
    raw_logratio_T = logprobs_T - torch.where(mask_T, old_logprobs_T.detach(), 0.0).to(dtype)
    return _Terms(
        logprobs_T=logprobs_T,
        advantages_T=torch.where(mask_T, advantages_T.detach(), 0.0).to(dtype),
        mask_T=mask_T,
        raw_logratio_T=raw_logratio_T,
        logratio_T=_bounded(raw_logratio_T, clamp),
    )


def _clipped_surrogate(terms: _Terms, logratio_T: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)) and where the clip decides it."""
    ratio_T = logratio_T.exp()
    unclipped_T = -terms.advantages_T * ratio_T
    bounded_T = ratio_T.detach().clamp(1.0 - _number(options, "eps_low"), 1.0 + _number(options, "eps_high"))
    clipped_loss_T = -terms.advantages_T * bounded_T
    clipped_T = (clipped_loss_T > unclipped_T.detach()) & terms.mask_T
    return torch.where(clipped_T, clipped_loss_T, unclipped_T), clipped_T


def _ppo(terms: _Terms, logratio_T: torch.Tensor, options: Options) -> tuple[torch.Tensor, Metrics]:
    loss_T, clipped_T = _clipped_surrogate(terms, logratio_T, options)
    metrics = _clip_metrics(terms, clipped_T)
    if options["dual_clip"] is not None:
        # Negative advantages only: the loss is at most -A c, so that a huge ratio stops pushing.
        bound_T = -terms.advantages_T * _number(options, "dual_clip")
        dual_T = (terms.advantages_T < 0) & (loss_T.detach() > bound_T) & terms.mask_T
        loss_T = torch.where(dual_T, bound_T, loss_T)
        metrics["clip/dual_fraction"] = _share(dual_T, terms.mask_T)
    return loss_T, metrics


def _sequence_logratio(terms: _Terms, trajectory_T: torch.Tensor, options: Options) -> torch.Tensor:
    """Value mean_t lr_t of the token's sequence, gradient that of log pi_t (GSPO-token, arXiv 2507.18071)."""
    trajectory_M = trajectory_T[terms.mask_T]
    sequences, index_M = torch.unique(trajectory_M, return_inverse=True)
    logratio_M = terms.raw_logratio_T.detach()[terms.mask_T]
    sums_S = logratio_M.new_zeros(len(sequences)).index_add_(0, index_M, logratio_M)
    counts_S = torch.bincount(index_M, minlength=len(sequences)).to(logratio_M.dtype)
    clamp = _number(options, "logratio_clamp")
    value_T = torch.zeros_like(terms.raw_logratio_T.detach())
    value_T[terms.mask_T] = (sums_S / counts_S)[index_M]
    return _bounded(value_T + (terms.logprobs_T - terms.logprobs_T.detach()), clamp)


def _cispo(terms: _Terms, options: Options) -> tuple[torch.Tensor, Metrics]:
    """-sg(clip(r)) A log pi: clipping bounds the weight and never stops a token's gradient (arXiv 2506.13585)."""
    ratio_T = terms.logratio_T.detach().exp()
    weight_T = ratio_T.clamp(1.0 - _number(options, "eps_low"), 1.0 + _number(options, "eps_high"))
    high_T, low_T = (ratio_T > weight_T) & terms.mask_T, (ratio_T < weight_T) & terms.mask_T
    metrics: Metrics = {
        "clip/high_fraction": _share(high_T, terms.mask_T),
        "clip/low_fraction": _share(low_T, terms.mask_T),
    }
    return -weight_T * terms.advantages_T * terms.logprobs_T, metrics


def _clip_cov(terms: _Terms, chosen_T: torch.Tensor, options: Options) -> tuple[torch.Tensor, Metrics]:
    """The clipped surrogate with value and gradient 0 on the chosen tokens."""
    loss_T, clipped_T = _clipped_surrogate(terms, terms.logratio_T, options)
    metrics = _clip_metrics(terms, clipped_T)
    # A chosen token that is clipped anyway is a wasted slot (spec B5.6).
    metrics["cov/selected_ratio_clipped"] = _share(clipped_T & chosen_T, chosen_T)
    return torch.where(chosen_T, 0.0, loss_T), metrics


def _kl_cov(terms: _Terms, chosen_T: torch.Tensor, options: Options) -> tuple[torch.Tensor, Metrics]:
    """-A r, plus beta times a KL term of the log ratio on the chosen tokens."""
    logratio_T = terms.logratio_T
    kind = options["kl"]
    if kind == "abs":
        kl_T = logratio_T.abs()
    elif kind == "k1":
        kl_T = -logratio_T
    elif kind == "k2":
        kl_T = logratio_T.square() / 2
    else:
        # Its derivative e^lr - 1 is put in as one number: left to autograd, (e^lr) - (1) is added up separately and
        # rounds to something other than 0 on policy.
        value_T = logratio_T.detach()
        slope_T = torch.expm1(value_T)
        kl_T = slope_T - value_T + slope_T * (logratio_T - value_T)
    penalty_T = torch.where(chosen_T, _number(options, "beta") * kl_T, 0.0)
    metrics: Metrics = {"cov/kl_penalty": _mean(penalty_T.detach(), chosen_T)}
    return -terms.advantages_T * logratio_T.exp() + penalty_T, metrics


def _number(options: Options, name: str) -> float:
    value = options[name]
    assert isinstance(value, int | float), f"option {name} is checked to be a number"
    return float(value)


def _mean(values_T: torch.Tensor, where_T: torch.Tensor) -> Mean:
    total = torch.where(where_T, values_T, 0.0).sum(dtype=torch.float64)
    return Mean(float(total), float(where_T.sum()))


def _share(part_T: torch.Tensor, whole_T: torch.Tensor) -> Mean:
    return Mean(float(part_T.sum()), float(whole_T.sum()))


def _ratio_metrics(terms: _Terms) -> Metrics:
    logratio_T = terms.logratio_T.detach()
    ratio_T = logratio_T.exp()
    metrics: Metrics = {
        # k3 of KL(pi_old || pi): e^lr - 1 - lr.
        "kl/old": _mean(torch.expm1(logratio_T) - logratio_T, terms.mask_T),
        "ratio/mean": _mean(ratio_T, terms.mask_T),
    }
    if bool(terms.mask_T.any()):
        metrics["ratio/max"] = Max(float(ratio_T[terms.mask_T].max()))
    return metrics


def _clip_metrics(terms: _Terms, clipped_T: torch.Tensor) -> Metrics:
    """A clipped token with A > 0 has met the upper bound, with A < 0 the lower one."""
    return {
        "clip/high_fraction": _share(clipped_T & (terms.advantages_T > 0), terms.mask_T),
        "clip/low_fraction": _share(clipped_T & (terms.advantages_T < 0), terms.mask_T),
    }


def _selection_metrics(terms: _Terms, chosen_T: torch.Tensor) -> Metrics:
    return {
        "cov/selected_fraction": _share(chosen_T, terms.mask_T),
        # KL-Cov cannot act where lr = 0 (spec B4).
        "cov/selected_on_policy": _share(chosen_T & (terms.raw_logratio_T.detach() == 0), chosen_T),
    }


def _bounded(x_T: torch.Tensor, bound: float) -> torch.Tensor:
    """Clamped to +-bound; the gradient is 1 at the bound itself, where torch's own clamp has 0 from 2.14 on."""
    return torch.where(x_T.abs() > bound, x_T.detach().clamp(-bound, bound), x_T)
