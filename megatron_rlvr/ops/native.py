"""The native backend: the ops of the extension `megatron_rlvr._C` behind the faces of `megatron_rlvr.ops`.

Importing this module loads the extension, which registers its ops with torch's dispatcher
(`torch.ops.megatron_rlvr`), adds their autograd formulas, and enters the implementations in the backend's table.

Letters: T tokens, V vocabulary columns of this rank's shard, R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

import megatron_rlvr._C  # noqa: F401  registers torch.ops.megatron_rlvr
from megatron_rlvr.ops.backend import register

_ops = torch.ops.megatron_rlvr


@register("vocab_parallel_logprob_entropy", backend="native")
def vocab_parallel_logprob_entropy(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_rlvr.ops.vocab_parallel_logprob_entropy`.

    The logits are read once here and read and written once in backward; columns that do not lie side by side are
    copied first.
    """
    if logits_TV.stride(1) != 1 and logits_TV.shape[1] > 1:
        logits_TV = logits_TV.contiguous()
    targets_T = targets_T.long().contiguous()
    with torch.no_grad():
        statistics_RT4, first_column = gather_statistics(logits_TV, targets_T, temperature=temperature, group=group)
    logprobs_T, entropy_T, _ = _ops.vocab_logprob_merge(
        logits_TV, targets_T, statistics_RT4, None, temperature, first_column, logits_TV.shape[1], inplace_backward
    )
    return logprobs_T, entropy_T


def gather_statistics(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, int]:
    """The statistics of all shards, by one read of the logits and one all-gather.

    Returns:
        fp64 [R, T, 4], packed as in csrc/ops/vocab_logprob.h, and the first column of this rank's shard.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    width = logits_TV.shape[1]
    if group is None or dist.get_world_size(group) == 1:
        check_targets(targets_T, vocab_size=width)
        return _ops.vocab_logprob_statistics(logits_TV, targets_T, None, temperature, 0, width)[None], 0
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    first_column = rank * width
    packed_T4 = _ops.vocab_logprob_statistics(logits_TV, targets_T, None, temperature, first_column, width)
    # The shard's width rides along, so that unequal shards need a second collective only where they occur.
    gathered_R = _all_gather(torch.cat([packed_T4.new_full((1, packed_T4.shape[1]), float(width)), packed_T4]), group)
    widths = [int(w) for w in gathered_R[:, 0, 0].tolist()]
    statistics_RT4 = gathered_R[:, 1:]
    if widths != [width] * ranks:
        first_column = sum(widths[:rank])
        packed_T4[:, 3] = _target_logits(logits_TV, targets_T, first_column=first_column) / temperature
        statistics_RT4 = _all_gather(packed_T4, group)
    check_targets(targets_T, vocab_size=sum(widths))
    return statistics_RT4, first_column


def check_targets(targets_T: torch.Tensor, *, vocab_size: int) -> None:
    """Raises ValueError for a target outside [0, vocab_size)."""
    if targets_T.numel() == 0:
        return
    low, high = (int(bound) for bound in targets_T.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets_T must be in [0, {vocab_size}), got {low if low < 0 else high}")


def _target_logits(logits_TV: torch.Tensor, targets_T: torch.Tensor, *, first_column: int) -> torch.Tensor:
    """fp64 [T] target logits, -inf where the target is not a column of this shard."""
    column_T = targets_T - first_column
    local_T = (column_T >= 0) & (column_T < logits_TV.shape[1])
    if not logits_TV.shape[1]:
        return torch.full(targets_T.shape, -torch.inf, dtype=torch.float64, device=logits_TV.device)
    picked_T = logits_TV.gather(1, column_T.clamp(0, logits_TV.shape[1] - 1)[:, None])[:, 0].double()
    return picked_T.where(local_T, -torch.inf)


def _all_gather(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[R, *local.shape] in rank order."""
    ranks = dist.get_world_size(group)
    gathered = local.new_empty(ranks * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(ranks, *local.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_TV, targets_T, _, mask_T, temperature, first_column, num_columns, inplace_backward = inputs
    saved_T3 = output[2]
    ctx.mark_non_differentiable(saved_T3)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TV, targets_T, saved_T3, mask_T)
    ctx.shard = (temperature, first_column, num_columns)
    ctx.inplace_backward = inplace_backward


@once_differentiable
def _logits_gradient(
    ctx: Any, grad_logprobs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None, _grad_saved: None
) -> tuple[torch.Tensor | None, ...]:
    # Reading the saved logits fails autograd's version check once anybody has written over them, this function
    # included: a second backward is refused, and so is another node that saved them.
    logits_TV, targets_T, saved_T3, mask_T = ctx.saved_tensors
    if mask_T is not None:
        grad_logprobs_T = None if grad_logprobs_T is None else grad_logprobs_T.where(mask_T, 0.0)
        grad_entropy_T = None if grad_entropy_T is None else grad_entropy_T.where(mask_T, 0.0)
    arguments = (targets_T, saved_T3, grad_logprobs_T, grad_entropy_T, *ctx.shard)
    if ctx.inplace_backward:
        _ops.vocab_logprob_gradient_(logits_TV, *arguments)
        gradient_TV = logits_TV.detach()
    else:
        gradient_TV = _ops.vocab_logprob_gradient(logits_TV, *arguments)
    return (gradient_TV, *[None] * 7)


torch.library.register_autograd(
    "megatron_rlvr::vocab_logprob_merge", _logits_gradient, setup_context=_keep_for_backward
)
