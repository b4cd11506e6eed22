"""The native backend of the ops over responses and tokens: advantages, token selection and policy loss.

Importing this module needs the extension, which registers its ops with torch's dispatcher
(`torch.ops.megatron_rlvr`). Here are the collectives between them and the autograd formula.

Letters: T packed tokens, C candidates of this rank, N responses, P groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

import megatron_rlvr._C  # noqa: F401  registers torch.ops.megatron_rlvr
from megatron_rlvr.metrics import Max, Mean, Metric
from megatron_rlvr.ops.advantage_options import AdvantageOptions
from megatron_rlvr.ops.backend import register
from megatron_rlvr.ops.covariance import TokenCovariance, covariance_from_sums
from megatron_rlvr.ops.exact import NUM_LIMBS, limbs_to_fraction, quantile_rank, selection_count

_ops = torch.ops.megatron_rlvr

# The enums of csrc/ops/*.h.
ESTIMATORS = (
    *("qae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"),
    *("psr", "nsr", "w_reinforce", "gpg", "opo"),
)
STDS = ("sample", "population", "none")
MASKS = ("qae", "pos_mask", "neg_mask", "none")
METHODS = ("clip_cov", "kl_cov")
LOSSES = ("ppo", "clip_cov", "kl_cov", "gspo", "cispo")
KL_KINDS = ("abs", "k1", "k2", "k3")
# The schema has every option; a loss does not read those that it does not have.
UNUSED_OPTIONS = {"eps_low": 0.0, "eps_high": 0.0, "dual_clip": None, "beta": 0.0, "kl": "abs"}

# (shift, bits) of the digits of a radix search from the top, 2,048 bins at most a pass.
DIGITS_64 = ((53, 11), (42, 11), (31, 11), (20, 11), (10, 10), (0, 10))
DIGITS_32 = ((21, 11), (10, 11), (0, 10))
MASK64 = (1 << 64) - 1


@register("group_advantages", backend="native")
def group_advantages(
    rewards_N: np.ndarray, group_sizes: list[int], *, estimator: str, options: AdvantageOptions
) -> np.ndarray:
    """See `megatron_rlvr.ops.group_advantages`."""
    sizes_P = np.asarray(group_sizes, dtype=np.int64)
    rank_P, below_P, fraction_P = _levels(sizes_P, estimator, options)
    gate = options.correctness_N if options.gate_on == "correctness" else None
    return _ops.group_advantages(
        *(_tensor(array) for array in (rewards_N, sizes_P, rank_P, below_P, fraction_P)),
        *(_optional(array) for array in (options.valid_N, gate, options.penalty_N, options.lengths_N)),
        ESTIMATORS.index(estimator),
        STDS.index(options.std),
        MASKS.index(options.mask),
        options.eps,
        options.positive_weight,
        options.penalty_additive,
    ).numpy()


def _levels(
    sizes_P: np.ndarray, estimator: str, options: AdvantageOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where K falls in each group's sorted values: rank m, index below, fraction to the next; exact integers."""
    if estimator != "qae" or options.K is None:
        zeros_P = np.zeros(len(sizes_P), dtype=np.int64)
        return zeros_P, zeros_P, zeros_P.astype(np.float64)
    valid_N = options.valid_N
    if valid_N is not None:
        counts = np.concatenate([[0], np.cumsum(valid_N)])
        borders = np.concatenate([[0], np.cumsum(sizes_P)])
        sizes_P = counts[borders[1:]] - counts[borders[:-1]]
    level_P = options.level_of_groups(len(sizes_P))
    cases = list(zip(level_P, sizes_P.tolist(), strict=True))
    found = {case: _level(*case, options.quantile) for case in set(cases)}
    levels = [found[case] for case in cases]
    rank_P, below_P, fraction_P = zip(*levels, strict=True) if levels else ((), (), ())
    return np.array(rank_P, np.int64), np.array(below_P, np.int64), np.array(fraction_P, np.float64)


def _level(level: Fraction, size: int, quantile: str) -> tuple[int, int, float]:
    if size == 0:
        return 0, 0, 0.0
    rank = quantile_rank(level, size)
    if quantile == "inf":
        return rank, rank - 1, 0.0
    position = level * (size - 1)
    below = math.floor(position)
    return rank, below, float(position - below)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _optional(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else _tensor(array)


@register("token_covariance", backend="native")
def token_covariance(
    logprobs_T: torch.Tensor, advantages_T: torch.Tensor, mask_T: torch.Tensor, *, group: dist.ProcessGroup | None
) -> TokenCovariance:
    """See `megatron_rlvr.ops.token_covariance`."""
    tokens = _same_dtype(logprobs_T, advantages_T)
    num_tokens, sums = _global_sums(*tokens, mask_T.contiguous(), group)
    return covariance_from_sums(
        logprobs_T,
        advantages_T,
        mask_T,
        num_tokens=num_tokens,
        logprob_sum=sums[0],
        advantage_sum=sums[1],
        product_sum=sums[2],
    )


def _global_sums(
    logprobs_T: torch.Tensor, advantages_T: torch.Tensor, mask_T: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[int, list[Fraction]]:
    """N and the exact sums of log pi, A and log pi A over all ranks, by one all-reduce."""
    packed = _ops.covariance_sums(logprobs_T, advantages_T, mask_T)
    _all_reduce(packed, group)
    packed = packed.cpu()
    num_tokens, num_bad = (int(count) for count in packed[:2].tolist())
    if num_bad:
        raise ValueError(f"logprobs_T and advantages_T must be finite on masked tokens, got {num_bad} that are not")
    return num_tokens, [limbs_to_fraction(limbs) for limbs in packed[2:].view(3, NUM_LIMBS)]


@register("select_tokens", backend="native")
def select_tokens(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    method: str,
    ratio: Fraction,
    lower: float,
    upper: float,
    excluded_T: torch.Tensor | None,
    trajectory_T: torch.Tensor,
    position_T: torch.Tensor,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """See `megatron_rlvr.ops.select_tokens`."""
    logprobs_T, advantages_T = _same_dtype(logprobs_T, advantages_T)
    mask_T = mask_T.contiguous()
    num_tokens, sums = _global_sums(logprobs_T, advantages_T, mask_T, group)
    count = selection_count(ratio, num_tokens)
    if count == 0:
        return torch.zeros_like(mask_T)
    index_C, key_C, id_C = _ops.selection_candidates(
        logprobs_T,
        advantages_T,
        mask_T,
        None if excluded_T is None else excluded_T.contiguous(),
        trajectory_T.long().contiguous(),
        position_T.long().contiguous(),
        METHODS.index(method),
        float(sums[0] / num_tokens),
        float(sums[1] / num_tokens),
        lower,
        upper,
        _as_signed(seed),
        _as_signed(step),
    )
    last_key, last_id = _last_selected(
        key_C, id_C, count, digits=DIGITS_32 if method == "kl_cov" else DIGITS_64, group=group
    )
    return _ops.selection_mark(index_C, key_C, id_C, _as_signed(last_key), _as_signed(last_id), len(mask_T))


def _last_selected(
    key_C: torch.Tensor,
    id_C: torch.Tensor,
    count: int,
    *,
    digits: tuple[tuple[int, int], ...],
    group: dist.ProcessGroup | None,
) -> tuple[int, int]:
    """The ``count``-th smallest (key, id) over all ranks, or something above all if there are not as many.

    A radix search from the top digit: one histogram all-reduce a pass, ended as soon as the prefix found holds no
    more than what is still wanted.
    """
    last_key, missing = _radix_search(
        lambda prefix, shift, bits: _ops.selection_digits(key_C, prefix, shift, bits), count, digits=digits, group=group
    )
    if missing is None:
        return last_key, MASK64
    last_id, _ = _radix_search(
        lambda prefix, shift, bits: _ops.selection_digits(id_C, prefix, shift, bits, key_C, _as_signed(last_key)),
        missing,
        digits=DIGITS_64,
        group=group,
    )
    return last_key, last_id


def _radix_search(
    histogram: Callable[[int, int, int], torch.Tensor],
    count: int,
    *,
    digits: tuple[tuple[int, int], ...],
    group: dist.ProcessGroup | None,
) -> tuple[int, int | None]:
    """The smallest value that ``count`` values do not exceed.

    Returns:
        The value, and how many of those equal to it are wanted; None if all are (also where fewer than ``count``
        values exist: then the value exceeds them all).
    """
    prefix = 0
    for shift, bits in digits:
        counts = histogram(_as_signed(prefix), shift, bits)
        _all_reduce(counts, group)
        cumulative = counts.cpu().cumsum(0)
        if int(cumulative[-1]) <= count:
            # Everything below this prefix and within it is wanted.
            return ((prefix + 1) << (shift + bits)) - 1, None
        found = int(torch.searchsorted(cumulative, count))
        count -= int(cumulative[found - 1]) if found else 0
        prefix = (prefix << bits) | found
        in_bin = int(cumulative[found]) - (int(cumulative[found - 1]) if found else 0)
        if in_bin == count:
            return ((prefix + 1) << shift) - 1, None
    return prefix, count


@register("policy_loss", backend="native")
def policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    loss: str,
    selected_T: torch.Tensor | None,
    trajectory_T: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """See `megatron_rlvr.ops.policy_loss`: loss, derivative and metrics in one pass."""
    tokens = _loss_tokens(logprobs_T, old_logprobs_T, advantages_T, mask_T)
    chosen = _chosen(tokens, selected_T, trajectory_T)
    loss_T, _, sums = _ops.policy_loss(*tokens, *chosen, *_loss_numbers(loss, options))
    return loss_T, _metrics(loss, sums.tolist(), dual_clip=options.get("dual_clip") is not None)


@register("aggregated_policy_loss", backend="native")
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
    options: dict[str, Any],
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """See `megatron_rlvr.ops.aggregated_policy_loss`: loss, derivative and metrics in one pass."""
    tokens = _loss_tokens(logprobs_T, old_logprobs_T, advantages_T, mask_T)
    total, _, sums = _ops.aggregated_policy_loss(
        *tokens,
        _constant(weights_T, logprobs_T.dtype),
        None if importance_T is None else _constant(importance_T, logprobs_T.dtype),
        *_chosen(tokens, selected_T, trajectory_T),
        *_loss_numbers(loss, options),
    )
    return total, _metrics(loss, sums.tolist(), dual_clip=options.get("dual_clip") is not None)


LossTokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _loss_tokens(
    logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, advantages_T: torch.Tensor, mask_T: torch.Tensor
) -> LossTokens:
    dtype = logprobs_T.dtype
    return (
        logprobs_T.contiguous(),
        _constant(old_logprobs_T, dtype),
        _constant(advantages_T, dtype),
        mask_T.contiguous(),
    )


def _constant(values_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values_T.detach().to(dtype).contiguous()


def _chosen(
    tokens: LossTokens, selected_T: torch.Tensor | None, trajectory_T: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Selected tokens, and GSPO's mean log ratio of each token's sequence."""
    selected_T = None if selected_T is None else selected_T.contiguous()
    if trajectory_T is None:
        return selected_T, None
    logprobs_T, old_logprobs_T, _, mask_T = tokens
    sequence_T = _ops.sequence_logratio(logprobs_T.detach(), old_logprobs_T, mask_T, trajectory_T.long().contiguous())
    return selected_T, sequence_T


def _loss_numbers(loss: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """The scalars at the end of both schemas."""
    complete = UNUSED_OPTIONS | options
    names = ("eps_low", "eps_high", "dual_clip", "logratio_clamp", "beta")
    return LOSSES.index(loss), *(complete[name] for name in names), KL_KINDS.index(complete["kl"])


@register("ratio_clipped", backend="native")
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
    dtype = logprobs_T.dtype
    inputs = (logprobs_T, old_logprobs_T.to(dtype), advantages_T.to(dtype), mask_T)
    return _ops.ratio_clipped(*(x.detach().contiguous() for x in inputs), eps_low, eps_high, logratio_clamp)


def _metrics(loss: str, sums: list[float], *, dual_clip: bool) -> dict[str, Metric]:
    """Metrics from the sums, in the order of csrc/ops/policy_loss.h."""
    tokens, k3, ratio, ratio_max, high, low, dual, selected, wasted, on_policy, penalty = sums
    metrics: dict[str, Metric] = {"kl/old": Mean(k3, tokens), "ratio/mean": Mean(ratio, tokens)}
    if tokens:
        metrics["ratio/max"] = Max(ratio_max)
    if loss != "kl_cov":
        metrics["clip/high_fraction"] = Mean(high, tokens)
        metrics["clip/low_fraction"] = Mean(low, tokens)
    if dual_clip:
        metrics["clip/dual_fraction"] = Mean(dual, tokens)
    if loss in METHODS:
        metrics["cov/selected_fraction"] = Mean(selected, tokens)
        metrics["cov/selected_on_policy"] = Mean(on_policy, selected)
    if loss == "clip_cov":
        metrics["cov/selected_ratio_clipped"] = Mean(wasted, selected)
    if loss == "kl_cov":
        metrics["cov/kl_penalty"] = Mean(penalty, selected)
    return metrics


def _same_dtype(logprobs_T: torch.Tensor, advantages_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both contiguous, fp64 if one is: widening loses nothing."""
    dtype = torch.promote_types(logprobs_T.dtype, advantages_T.dtype)
    return logprobs_T.detach().to(dtype).contiguous(), advantages_T.detach().to(dtype).contiguous()


def _as_signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - (1 << 64) if value >> 63 else value


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(tensor, group=group)


def _keep_slope(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, slope_T, sums = output
    ctx.num_arguments = len(inputs)
    ctx.mark_non_differentiable(slope_T, sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slope_T)


@once_differentiable
def _logprob_gradient(ctx: Any, grad_loss_T: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    (slope_T,) = ctx.saved_tensors
    # The aggregated loss is fp64 of fp32 tokens.
    grad_T = None if grad_loss_T is None else grad_loss_T.to(slope_T.dtype) * slope_T
    return (grad_T, *[None] * (ctx.num_arguments - 1))


for _name in ("policy_loss", "aggregated_policy_loss"):
    torch.library.register_autograd(f"megatron_rlvr::{_name}", _logprob_gradient, setup_context=_keep_slope)
