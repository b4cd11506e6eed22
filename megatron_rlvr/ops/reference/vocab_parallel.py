"""Log-prob and entropy from vocabulary-parallel logits with one collective (spec D).

Letters: T tokens, V vocabulary columns of this rank's shard, R ranks of the group.
With x = logits / temperature: M = max x, S = sum e^(x-M), W = sum (x-M) e^(x-M), log Z = M + log S,
log pi = x_target - log Z, H = log S - W / S. Both terms of H are shifted, so a constant added to the logits
costs no accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_rlvr.ops.backend import register

# Rows are worked on in blocks of about this many logits, so that temporaries stay small and in cache.
BLOCK_ELEMENTS = 1 << 20
# e^x is 0 below it in fp32 and fp64; a finite floor keeps 0 * log 0 from being NaN.
LOG_FLOOR = -1e4


@register("vocab_parallel_logprob_entropy", backend="reference")
def vocab_parallel_logprob_entropy(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_rlvr.ops.vocab_parallel_logprob_entropy`."""
    return _LogprobEntropy.apply(logits_TV, targets_T, temperature, group, inplace_backward)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = logits_TV.shape[1]
        rank = 0 if group is None else dist.get_rank(group)
        world_size = 1 if group is None else dist.get_world_size(group)
        first_column = rank * width
        stats_T4 = shard_statistics(logits_TV, targets_T, temperature=temperature, first_column=first_column)
        # The shard's width rides along, so that unequal shards are noticed without a second collective.
        header = torch.tensor([[width, 0, 0, 0]], dtype=stats_T4.dtype, device=stats_T4.device)
        gathered_RT4 = _all_gather(torch.cat([header, stats_T4]), group, world_size)
        widths = [int(width) for width in gathered_RT4[:, 0, 0].tolist()]
        stats_RT4 = gathered_RT4[:, 1:]
        if len(set(widths)) > 1:
            first_column = sum(widths[:rank])
            target_T = _target_logits(logits_TV, targets_T, temperature=temperature, first_column=first_column)
            stats_RT4 = stats_RT4.clone()
            stats_RT4[:, :, 3] = _all_gather(target_T, group, world_size)
        check_targets(targets_T, vocab_size=sum(widths))
        logprobs_T, entropy_T, max_T, log_total_T = merge_statistics(stats_RT4)
        check_normaliser(max_T, log_total_T)
        ctx.save_for_backward(logits_TV, targets_T, max_T, log_total_T, entropy_T)
        ctx.temperature = temperature
        ctx.first_column = first_column
        ctx.inplace_backward = inplace_backward
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: torch.Tensor, grad_entropy_T: torch.Tensor) -> Any:
        # Reading saved_tensors a second time after writing in place fails autograd's version check, which is how
        # anybody else who still needs the logits is refused.
        logits_TV, targets_T, max_T, log_total_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV if ctx.inplace_backward else torch.empty_like(logits_TV)
        write_logits_gradient(
            grad_TV,
            logits_TV,
            targets_T,
            max_T,
            log_total_T,
            entropy_T,
            grad_logprobs_T,
            grad_entropy_T,
            temperature=ctx.temperature,
            first_column=ctx.first_column,
        )
        return grad_TV, None, None, None, None


def accumulation_dtype(logits_TV: torch.Tensor) -> torch.dtype:
    """fp64 for fp64 logits, else fp32."""
    return torch.float64 if logits_TV.dtype == torch.float64 else torch.float32


def shard_statistics(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, first_column: int
) -> torch.Tensor:
    """This shard's (max x, sum e, sum (x-max) e, x_target or -inf) per token.

    A fully masked shard (all -inf) gives (-inf, 0, 0, .).

    Returns:
        fp32 or fp64 [T, 4].
    """
    num_tokens, width = logits_TV.shape
    stats_T4 = torch.empty(num_tokens, 4, dtype=accumulation_dtype(logits_TV), device=logits_TV.device)
    for start, stop in _row_blocks(num_tokens, width):
        x_BV = _scaled(logits_TV[start:stop], temperature)
        max_B = x_BV.amax(dim=1) if width else x_BV.new_full((stop - start,), -torch.inf)
        # Where the maximum is -inf the difference would be NaN; such rows are all -inf, with e = 0.
        shifted_BV = x_BV.sub_(torch.where(max_B == -torch.inf, 0.0, max_B)[:, None])
        exp_BV = shifted_BV.exp()
        stats_T4[start:stop, 0] = max_B
        stats_T4[start:stop, 1] = exp_BV.sum(dim=1)
        stats_T4[start:stop, 2] = exp_BV.mul_(shifted_BV.clamp_min_(LOG_FLOOR)).sum(dim=1)
    stats_T4[:, 3] = _target_logits(logits_TV, targets_T, temperature=temperature, first_column=first_column)
    return stats_T4


def merge_statistics(stats_RT4: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Merges shard statistics in rank order, the same additions on every rank (spec D2).

    Returns:
        log-probs, entropies, M and log S, each [T], in nats. M and log S stay apart: their sum, log Z, would lose
        the small one to the rounding of a large common offset.
    """
    max_RT, sum_RT, weighted_RT, target_RT = stats_RT4.unbind(dim=2)
    max_T = max_RT.amax(dim=0)
    finite_max_T = torch.where(max_T == -torch.inf, 0.0, max_T)
    total_T = torch.zeros_like(max_T)
    weighted_T = torch.zeros_like(max_T)
    for rank in range(stats_RT4.shape[0]):
        masked_T = max_RT[rank] == -torch.inf
        offset_T = torch.where(masked_T, 0.0, max_RT[rank] - finite_max_T)
        factor_T = offset_T.exp()
        total_T += sum_RT[rank] * factor_T
        weighted_T += (weighted_RT[rank] + offset_T * sum_RT[rank]) * factor_T
    log_total_T = total_T.log()
    # (x_target - M) - log S rather than x_target - log Z: exact under a common offset.
    logprobs_T = (target_RT.amax(dim=0) - max_T) - log_total_T
    entropy_T = log_total_T - weighted_T / total_T
    return logprobs_T, entropy_T, max_T, log_total_T


def write_logits_gradient(
    grad_TV: torch.Tensor,
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    max_T: torch.Tensor,
    log_total_T: torch.Tensor,
    entropy_T: torch.Tensor,
    grad_logprobs_T: torch.Tensor,
    grad_entropy_T: torch.Tensor,
    *,
    temperature: float,
    first_column: int,
) -> None:
    """dL/dx_j = (g_lp (1{j = target} - p_j) - g_H p_j (log p_j + H)) / temperature (spec D1).

    ``grad_TV`` may be ``logits_TV`` itself.
    """
    num_tokens, width = logits_TV.shape
    dtype = accumulation_dtype(logits_TV)
    scale = 1.0 / temperature
    for start, stop in _row_blocks(num_tokens, width):
        g_logprob_B1 = grad_logprobs_T[start:stop, None].to(dtype) * scale
        g_entropy_B1 = grad_entropy_T[start:stop, None].to(dtype) * scale
        log_p_BV = (
            _scaled(logits_TV[start:stop], temperature)
            .sub_(max_T[start:stop, None])
            .sub_(log_total_T[start:stop, None])
        )
        p_BV = log_p_BV.exp()
        log_p_BV.clamp_min_(LOG_FLOOR)
        # -p (g_lp + g_H (log p + H))
        block_BV = log_p_BV.add_(entropy_T[start:stop, None]).mul_(g_entropy_B1).add_(g_logprob_B1).mul_(p_BV).neg_()
        column_B = targets_T[start:stop] - first_column
        local_B = (column_B >= 0) & (column_B < width)
        if width:
            block_BV.scatter_add_(
                1, column_B.clamp(0, width - 1)[:, None].long(), torch.where(local_B[:, None], g_logprob_B1, 0.0)
            )
        grad_TV[start:stop] = block_BV


def check_targets(targets_T: torch.Tensor, *, vocab_size: int) -> None:
    """Raises ValueError for a target outside [0, vocab_size)."""
    if targets_T.numel() == 0:
        return
    low, high = (int(bound) for bound in targets_T.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets_T must be in [0, {vocab_size}), got {low if low < 0 else high}")


def check_normaliser(max_T: torch.Tensor, log_total_T: torch.Tensor) -> None:
    """Raises ValueError where a row of logits has no finite normaliser."""
    bad_T = ~(max_T.isfinite() & log_total_T.isfinite())
    if bool(bad_T.any()):
        token = int(bad_T.nonzero()[0, 0])
        raise ValueError(
            "logits_TV must be finite or -inf with a finite maximum in every row, "
            f"got NaN, +inf or only -inf in row {token}"
        )


def _scaled(logits_BV: torch.Tensor, temperature: float) -> torch.Tensor:
    """A fresh copy in the accumulation dtype, divided by the temperature after the upcast."""
    x_BV = logits_BV.detach().to(accumulation_dtype(logits_BV), copy=True)
    return x_BV if temperature == 1.0 else x_BV.div_(temperature)


def _target_logits(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, first_column: int
) -> torch.Tensor:
    """x_target where the target is a column of this shard, else -inf."""
    num_tokens, width = logits_TV.shape
    dtype = accumulation_dtype(logits_TV)
    if not width:
        return torch.full((num_tokens,), -torch.inf, dtype=dtype, device=logits_TV.device)
    column_T = targets_T.long() - first_column
    local_T = (column_T >= 0) & (column_T < width)
    picked_T = logits_TV.detach().gather(1, column_T.clamp(0, width - 1)[:, None])[:, 0].to(dtype)
    return torch.where(local_T, picked_T / temperature, -torch.inf)


def _row_blocks(num_tokens: int, width: int) -> list[tuple[int, int]]:
    rows = max(1, BLOCK_ELEMENTS // max(1, width))
    return [(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows)]


def _all_gather(local: torch.Tensor, group: dist.ProcessGroup | None, world_size: int) -> torch.Tensor:
    """[R, *local.shape] in rank order."""
    if group is None or world_size == 1:
        return local[None]
    gathered = local.new_empty(world_size * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(world_size, *local.shape)
