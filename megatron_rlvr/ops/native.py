"""The native backend: the ops of the extension `megatron_rlvr._C` behind the faces of `megatron_rlvr.ops`.

Importing this module loads the extension, which registers its ops with torch's dispatcher
(`torch.ops.megatron_rlvr`), adds their autograd formulas, and enters the implementations in the backend's table.

Letters: T tokens, V vocabulary columns of this rank's shard, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    copied first. On CUDA, logits are bf16, fp16 or fp32, and a row without a finite normaliser gives NaN instead of
    an error, which would have to wait for the device.
    """
    if logits_TV.stride(1) != 1 and logits_TV.shape[1] > 1:
        logits_TV = logits_TV.contiguous()
    targets_T = targets_T.long().contiguous()
    width = logits_TV.shape[1]

    def statistics(first_column: int) -> torch.Tensor:
        return _ops.vocab_logprob_statistics(logits_TV, targets_T, None, temperature, first_column, width)

    with torch.no_grad():
        statistics_RT4, first_column, vocab_size = gather_statistics(statistics, width=width, group=group)
    check_targets(targets_T, vocab_size=vocab_size)
    logprobs_T, entropy_T, _ = _ops.vocab_logprob_merge(
        logits_TV, targets_T, statistics_RT4, None, temperature, first_column, width, inplace_backward
    )
    return logprobs_T, entropy_T


@register("vocab_parallel_moments", backend="native")
def vocab_parallel_moments(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, group: dist.ProcessGroup | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """See `megatron_rlvr.ops.vocab_parallel_moments`: (log-probs, entropies) and all shards' statistics [R, T, 6]."""
    logits_TV = logits_TV.detach()
    if logits_TV.stride(1) != 1 and logits_TV.shape[1] > 1:
        logits_TV = logits_TV.contiguous()
    targets_T = targets_T.long().contiguous()
    width = logits_TV.shape[1]

    def statistics(first_column: int) -> torch.Tensor:
        return _ops.vocab_logprob_statistics(logits_TV, targets_T, None, temperature, first_column, width, True)

    statistics_RT6, first_column, vocab_size = gather_statistics(statistics, width=width, group=group)
    check_targets(targets_T, vocab_size=vocab_size)
    logprobs_T, entropy_T, _ = _ops.vocab_logprob_merge(
        logits_TV, targets_T, statistics_RT6, None, temperature, first_column, width
    )
    return (logprobs_T, entropy_T), statistics_RT6


def gather_statistics(
    statistics: Callable[[int], torch.Tensor], *, width: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, int, int]:
    """The statistics of all shards, by one all-gather.

    Args:
        statistics: gives this shard's fp64 [T, 4 or 6] (packed as in csrc/ops/vocab_logprob.h) for its first column.
        width: columns of this shard. Where ranks differ in it, which the trainer's layouts never do, the
            statistics are taken and gathered a second time.

    Returns:
        fp64 [R, T, 4 or 6] in rank order, the first column of this rank's shard, the vocabulary's size.
    """
    if group is None or dist.get_world_size(group) == 1:
        return statistics(0)[None], 0, width
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    packed_T4 = statistics(rank * width)
    header = packed_T4.new_full((1, packed_T4.shape[1]), float(width))
    gathered_R = _all_gather(torch.cat([header, packed_T4]), group)
    widths = [int(w) for w in gathered_R[:, 0, 0].tolist()]
    first_column = sum(widths[:rank])
    if widths == [width] * ranks:
        return gathered_R[:, 1:], first_column, sum(widths)
    return _all_gather(statistics(first_column), group), first_column, sum(widths)


def check_targets(targets_T: torch.Tensor, *, vocab_size: int) -> None:
    """Raises ValueError for a target outside [0, vocab_size)."""
    if targets_T.numel() == 0:
        return
    low, high = torch.stack(targets_T.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets_T must be in [0, {vocab_size}), got {low if low < 0 else high}")


def _all_gather(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[R, *local.shape] in rank order."""
    ranks = dist.get_world_size(group)
    gathered = local.new_empty(ranks * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(ranks, *local.shape)


@register("pack_bucket", backend="native")
def pack_bucket(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
    """See `megatron_rlvr.ops.pack_bucket`."""
    return _ops.pack_bucket(list(tensors), dtype)


@register("unpack_bucket_into", backend="native")
def unpack_bucket_into(flat: torch.Tensor, out: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """See `megatron_rlvr.ops.unpack_bucket`."""
    _ops.unpack_bucket_(flat, list(out), dtype)


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
