"""Public functions of the ops: they check arguments and hand over to the current backend.

Letters: T packed tokens, V vocabulary columns of this rank's shard, N responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rlvr.metrics import Metric
from megatron_rlvr.ops.advantage_options import parse_advantage_options
from megatron_rlvr.ops.backend import implementation
from megatron_rlvr.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    LOGIT_DTYPES,
    check_choice,
    check_not_negative,
    check_number,
    check_positive,
    check_same_length,
    check_tensor,
    check_unsigned,
)
from megatron_rlvr.ops.covariance import TokenCovariance
from megatron_rlvr.ops.exact import parse_ratio
from megatron_rlvr.ops.loss_options import COVARIANCE_LOSSES, check_eps_low, parse_loss_options

MASK_DTYPES = (torch.bool,)


def vocab_parallel_logprob_entropy(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of the targets and entropy of softmax(logits / temperature), the vocabulary split over ``group``.

    One all-gather of four numbers a token; every rank returns bitwise equal values. Differentiable in both
    outputs; nothing but the logits and a few numbers a token is kept for backward (spec D1, D2, D4).

    Args:
        logits_TV: bf16, fp16, fp32 or fp64 [T, V] of this rank's shard, any row stride; -inf marks columns that
            do not exist. Shards follow one another in rank order.
        targets_T: int64 or int32 [T] ids in the whole vocabulary, the same on all ranks.
        temperature: divides the logits after the upcast to fp32.
        group: process group of the shards; None for an unsharded vocabulary.
        inplace_backward: writes the gradient over the logits. Autograd refuses when another node still needs them.

    Returns:
        log-probs and entropies in nats, fp32 [T] (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: bad type, shape, dtype or temperature; a target outside the vocabulary; a row of
            logits with NaN, +inf or nothing but -inf; in-place backward over a leaf.
    """
    check_tensor(logits_TV, name="logits_TV", dims=2, dtypes=LOGIT_DTYPES)
    check_tensor(targets_T, name="targets_T", dims=1, dtypes=INTEGER_DTYPES)
    check_same_length(logits_TV.shape[0], targets_T=targets_T)
    temperature = check_positive(temperature, name="temperature")
    if inplace_backward and logits_TV.is_leaf and logits_TV.requires_grad:
        raise ValueError(
            "inplace_backward must be false where logits_TV are a leaf (their value would be lost), got true"
        )
    return implementation("vocab_parallel_logprob_entropy")(
        logits_TV, targets_T, temperature=temperature, group=group, inplace_backward=inplace_backward
    )


def group_advantages(
    rewards_N: Sequence[float] | np.ndarray | torch.Tensor,
    group_sizes: int | Sequence[int] | np.ndarray | torch.Tensor,
    *,
    estimator: str = "qae",
    **options: Any,
) -> torch.Tensor:
    """Advantages of the responses of ragged groups (spec A, E4).

    A group with equal rewards gets exactly 0 from every estimator with a group baseline, and so does one with
    fewer than two valid responses.

    Args:
        rewards_N: list, array or tensor [N], group after group.
        group_sizes: responses of each group, or one number for equal groups.
        estimator: qae, grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, psr, nsr, w_reinforce, gpg, opo.
        **options: for all: ``valid_N`` (bool; invalid responses get 0 and count nowhere).
            qae: ``K`` (in (0, 1), string or number, or one for each group; default "0.4"), ``quantile`` (inf |
            linear), ``std``
            (sample | population | none), ``eps`` (1e-6), ``mask`` (qae | pos_mask | neg_mask | none), ``gate_on``
            (correctness | reward; correctness if ``correctness_N`` is given), ``correctness_N`` (0 or 1),
            ``penalty_N`` (<= 0 on the +-1 scale), ``penalty_additive`` (true).
            grpo: ``std`` (sample | population), ``eps`` (1e-6). reinforce_pp, reinforce_pp_baseline, opo:
            ``lengths_N`` (tokens). w_reinforce: ``positive_weight`` (0.1).

    Returns:
        [N], float32 for a float32, bf16 or fp16 tensor or array, else float64; on the device of a tensor.

    Raises:
        TypeError: an option that the estimator does not have.
        ValueError: bad shape or value, K outside (0, 1), rewards not finite.
    """
    if isinstance(rewards_N, torch.Tensor):
        device = rewards_N.device
        single = rewards_N.dtype in (torch.float32, torch.bfloat16, torch.float16)
        rewards = rewards_N.detach().cpu().double().numpy()
    else:
        device = torch.device("cpu")
        array = np.asarray(rewards_N)
        single = array.dtype in (np.float32, np.float16)
        rewards = array.astype(np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards_N must have 1 dimension, got shape {list(rewards.shape)}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards_N must be finite, got {rewards[~np.isfinite(rewards)][0]}")
    sizes = _group_sizes(group_sizes, num_responses=len(rewards))
    parsed = parse_advantage_options(estimator, options, rewards_N=rewards, num_groups=len(sizes))
    advantages = implementation("group_advantages")(rewards, sizes, estimator=estimator, options=parsed)
    return torch.as_tensor(advantages, dtype=torch.float32 if single else torch.float64, device=device)


def token_covariance(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> TokenCovariance:
    """Cov_t = (log pi_t - mean log pi)(A_t - mean A), means over the masked tokens of all ranks (spec B1).

    The sums behind the means are exact, so that values are bitwise equal for any sharding. One all-reduce.

    Args:
        logprobs_T: fp32 or fp64 [T] nats.
        advantages_T: fp32 or fp64 [T].
        mask_T: bool [T], the response tokens; each token is on one rank of the group only.
        group: data-parallel ranks, or None for these tokens alone.

    Raises:
        TypeError, ValueError: bad type, shape or dtype; a masked log-prob or advantage that is not finite.
    """
    _check_tokens(logprobs_T, mask_T, advantages_T=advantages_T)
    return implementation("token_covariance")(logprobs_T, advantages_T, mask_T, group=group)


def select_tokens(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    method: str,
    ratio: str | float | Fraction,
    lower: float = 1.0,
    upper: float = 5.0,
    ratio_clipped_T: torch.Tensor | None = None,
    excluded_T: torch.Tensor | None = None,
    trajectory_T: torch.Tensor,
    position_T: torch.Tensor,
    seed: int = 0,
    step: int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Marks the tokens that Clip-Cov or KL-Cov act on, exactly and over all ranks of ``group`` (spec B3-B5).

    n = max(1, floor(ratio * N)) tokens, N the masked tokens of the group. ``clip_cov``: n tokens drawn uniformly
    (the smallest splitmix64 keys of seed, step and token) from those with lower < Cov < upper that are not
    ratio-clipped. ``kl_cov``: the n largest Cov, ties by (trajectory, position) ascending. Cov is rounded to
    float32. The set is bitwise the same for any number of ranks, packing or micro-batch split.

    Args:
        logprobs_T: fp32 or fp64 [T] nats.
        advantages_T: fp32 or fp64 [T].
        mask_T: bool [T], the response tokens.
        method: clip_cov or kl_cov.
        ratio: share of the tokens in (0, 1]; a string or Fraction is exact, a float counts as its shortest decimal.
        lower, upper: clip_cov's exclusive bounds of Cov.
        ratio_clipped_T: bool [T] from `ratio_clipped`, clip_cov only.
        excluded_T: bool [T] further tokens that are never selected, though they count in N and in the means.
        trajectory_T: int [T] index of the response in the optimizer step, unique over the group, below 2**31.
        position_T: int [T] index of the token in its response; (trajectory, position) is unique where masked.
        seed, step: 64-bit numbers of clip_cov's draw; kl_cov draws nothing.
        group: data-parallel ranks, or None for these tokens alone.

    Returns:
        bool [T].

    Raises:
        TypeError, ValueError: bad type, shape, dtype or value; lower/upper/ratio_clipped_T given to kl_cov.
    """
    _check_tokens(logprobs_T, mask_T, advantages_T=advantages_T)
    check_choice(method, name="method", choices=COVARIANCE_LOSSES)
    exact_ratio = parse_ratio(ratio)
    check_number(lower, name="lower")
    check_number(upper, name="upper")
    if not lower < upper:
        raise ValueError(f"lower must be below upper, got {lower!r} and {upper!r}")
    for name, tensor in {"trajectory_T": trajectory_T, "position_T": position_T}.items():
        check_tensor(tensor, name=name, dims=1, dtypes=INTEGER_DTYPES)
        check_same_length(logprobs_T.shape[0], **{name: tensor})
        low, high = _range(torch.where(mask_T, tensor, 0))
        if low < 0 or high >= 1 << 31:
            raise ValueError(f"{name} must be in [0, 2**31) on masked tokens, got {low if low < 0 else high}")
    if method == "kl_cov" and (ratio_clipped_T is not None or (lower, upper) != (1.0, 5.0)):
        raise ValueError("lower, upper and ratio_clipped_T have no effect with method='kl_cov'")
    for name, marks in {"ratio_clipped_T": ratio_clipped_T, "excluded_T": excluded_T}.items():
        if marks is not None:
            check_tensor(marks, name=name, dims=1, dtypes=MASK_DTYPES)
            check_same_length(logprobs_T.shape[0], **{name: marks})
    if ratio_clipped_T is not None:
        excluded_T = ratio_clipped_T if excluded_T is None else ratio_clipped_T | excluded_T
    return implementation("select_tokens")(
        logprobs_T,
        advantages_T,
        mask_T,
        method=method,
        ratio=exact_ratio,
        lower=float(lower),
        upper=float(upper),
        excluded_T=excluded_T,
        trajectory_T=trajectory_T,
        position_T=position_T,
        seed=check_unsigned(seed, name="seed"),
        step=check_unsigned(step, name="step"),
        group=group,
    )


def policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    loss: str,
    selected_T: torch.Tensor | None = None,
    trajectory_T: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Loss of every token, not aggregated, differentiable in ``logprobs_T`` (spec B3, B4, E1).

    ppo: max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)), at most -A dual_clip where A < 0.
    clip_cov: the same without dual clip, value and gradient 0 on selected tokens.
    kl_cov: -A r, plus beta kl(log ratio) on selected tokens.
    gspo: ppo on the sequence's geometric-mean ratio, which needs ``trajectory_T`` and whole sequences.
    cispo: -sg(clip(r)) A log pi.

    Args:
        logprobs_T: fp32 or fp64 [T] nats, current policy.
        old_logprobs_T: fp32 or fp64 [T] nats, policy before the updates.
        advantages_T: fp32 or fp64 [T].
        mask_T: bool [T]; elsewhere inputs may hold anything.
        loss: ppo, clip_cov, kl_cov, gspo or cispo.
        selected_T: bool [T] of `select_tokens`, for clip_cov and kl_cov only.
        trajectory_T: int [T] response of each token, for gspo only.
        **options: ``logratio_clamp`` (20) for all; ``eps_low``, ``eps_high`` (ppo .2, .28; clip_cov 1, 1; gspo
            3e-4, 4e-4; cispo 1, .28); ``dual_clip`` (ppo, gspo; None); ``beta`` (1), ``kl`` (abs | k1 | k2 | k3) for
            kl_cov, of KL(pi_old || pi).

    Returns:
        fp32 [T] (fp64 for fp64 log-probs), 0 outside the mask, and metrics that merge over micro-batches.

    Raises:
        TypeError: an option that the loss does not have.
        ValueError: bad shape, dtype or value; ``selected_T`` or ``trajectory_T`` missing or without effect.
    """
    parsed = parse_loss_options(loss, options)
    _check_tokens(logprobs_T, mask_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    _check_chosen(logprobs_T, loss, selected_T=selected_T, trajectory_T=trajectory_T)
    return implementation("policy_loss")(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        loss=loss,
        selected_T=selected_T,
        trajectory_T=trajectory_T,
        options=parsed,
    )


def aggregated_policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    weights_T: torch.Tensor,
    importance_T: torch.Tensor | None = None,
    loss: str,
    selected_T: torch.Tensor | None = None,
    trajectory_T: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """`policy_loss` summed over tokens with their weights, in one pass that writes no per-token loss.

    The sum over masked tokens of weight x importance x loss is taken in fp64 in a fixed order; weights and importance
    are constants to autograd. With denominators inside the weights, sums over micro-batches and ranks add up to the
    loss of the whole optimizer step.

    Args:
        weights_T: fp32 or fp64 [T] aggregation weights, as `megatron_rlvr.loss.token_weights` makes them.
        importance_T: fp32 or fp64 [T] importance weights, 0 for rejected tokens; None for 1 throughout.
        Others: see `policy_loss`.

    Returns:
        The loss, a scalar of fp64, differentiable in ``logprobs_T``; metrics of the unweighted tokens.

    Raises:
        TypeError, ValueError: see `policy_loss`.
    """
    parsed = parse_loss_options(loss, options)
    values = {"old_logprobs_T": old_logprobs_T, "advantages_T": advantages_T, "weights_T": weights_T}
    if importance_T is not None:
        values["importance_T"] = importance_T
    _check_tokens(logprobs_T, mask_T, **values)
    _check_chosen(logprobs_T, loss, selected_T=selected_T, trajectory_T=trajectory_T)
    return implementation("aggregated_policy_loss")(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        weights_T=weights_T,
        importance_T=importance_T,
        loss=loss,
        selected_T=selected_T,
        trajectory_T=trajectory_T,
        options=parsed,
    )


def ratio_clipped(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    eps_low: float = 1.0,
    eps_high: float = 1.0,
    logratio_clamp: float = 20.0,
) -> torch.Tensor:
    """Where the ratio clip of `policy_loss` decides the loss, which Clip-Cov leaves out of its draw (spec B3).

    Args: see `policy_loss`; defaults are those of clip_cov.

    Returns:
        bool [T].
    """
    _check_tokens(logprobs_T, mask_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    return implementation("ratio_clipped")(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        eps_low=check_eps_low(eps_low),
        eps_high=check_not_negative(eps_high, name="eps_high"),
        logratio_clamp=check_positive(logratio_clamp, name="logratio_clamp"),
    )


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Smallest and largest entry; zeros where there are none."""
    if tensor.numel() == 0:
        return 0, 0
    low, high = tensor.aminmax()
    return int(low), int(high)


def _check_tokens(logprobs_T: torch.Tensor, mask_T: torch.Tensor, **values: torch.Tensor) -> None:
    check_tensor(logprobs_T, name="logprobs_T", dims=1, dtypes=FLOAT_DTYPES)
    for name, tensor in values.items():
        check_tensor(tensor, name=name, dims=1, dtypes=FLOAT_DTYPES)
    check_tensor(mask_T, name="mask_T", dims=1, dtypes=MASK_DTYPES)
    check_same_length(logprobs_T.shape[0], mask_T=mask_T, **values)


def _check_chosen(
    logprobs_T: torch.Tensor, loss: str, *, selected_T: torch.Tensor | None, trajectory_T: torch.Tensor | None
) -> None:
    _check_needed(selected_T, name="selected_T", loss=loss, users=COVARIANCE_LOSSES, dtypes=MASK_DTYPES)
    _check_needed(trajectory_T, name="trajectory_T", loss=loss, users=("gspo",), dtypes=INTEGER_DTYPES)
    for name, tensor in {"selected_T": selected_T, "trajectory_T": trajectory_T}.items():
        if tensor is not None:
            check_same_length(logprobs_T.shape[0], **{name: tensor})


def _check_needed(
    tensor: torch.Tensor | None, *, name: str, loss: str, users: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if loss in users:
        if tensor is None:
            raise ValueError(f"{name} must be given for loss {loss!r}, got None")
        check_tensor(tensor, name=name, dims=1, dtypes=dtypes)
    elif tensor is not None:
        raise ValueError(f"{name} has no effect with loss {loss!r}; it is for {list(users)}")


def _group_sizes(group_sizes: Any, *, num_responses: int) -> list[int]:
    """One size a group, checked against the number of rewards."""
    if isinstance(group_sizes, Integral) and not isinstance(group_sizes, bool):
        group_sizes = int(group_sizes)
        if group_sizes < 1 or num_responses % group_sizes:
            raise ValueError(f"group_sizes must divide the {num_responses} rewards, got {group_sizes}")
        return [group_sizes] * (num_responses // group_sizes)
    sizes = np.asarray(group_sizes.detach().cpu() if isinstance(group_sizes, torch.Tensor) else group_sizes)
    if sizes.size == 0:
        sizes = sizes.astype(np.int64)
    if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer) or (sizes.size and sizes.min() < 0):
        raise ValueError(f"group_sizes must be integers, 0 or above, got {group_sizes!r}")
    if int(sizes.sum()) != num_responses:
        raise ValueError(f"group_sizes must add up to the {num_responses} rewards, got a sum of {int(sizes.sum())}")
    return [int(size) for size in sizes]
