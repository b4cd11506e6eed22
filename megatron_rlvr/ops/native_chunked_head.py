"""The chunked head on the extension's ops.

Letters: T tokens, C tokens of a chunk, D hidden, V vocabulary columns of this rank's shard, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_rlvr.ops.backend import register
from megatron_rlvr.ops.native import check_targets, gather_statistics

_ops = torch.ops.megatron_rlvr


@register("chunked_logprob_entropy", backend="native")
def chunked_logprob_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_bytes: int,
    num_real: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_rlvr.ops.chunked_logprob_entropy`."""
    targets_T = targets_T.long().contiguous()
    return _ChunkedHead.apply(hidden_TD, weight_VD, targets_T, temperature, group, chunk_bytes, num_real)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        chunk_bytes: int,
        num_real: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = weight_VD.shape[0]

        def statistics(first_column: int) -> torch.Tensor:
            chunks = [
                _ops.vocab_logprob_statistics(logits_CV, targets_T[tokens], None, temperature, first_column, width)
                for tokens, logits_CV in _logits_chunks(hidden_TD, weight_VD, chunk_bytes, num_real)
            ]
            return torch.cat(chunks) if chunks else hidden_TD.new_empty(0, 4, dtype=torch.float64)

        statistics_RT4, first_column, vocab_size = gather_statistics(statistics, width=width, group=group)
        check_targets(targets_T, vocab_size=vocab_size)
        # The merge looks at the logits for their dtype alone.
        logprobs_T, entropy_T, saved_T3 = _ops.vocab_logprob_merge(
            hidden_TD[:, :0], targets_T, statistics_RT4, None, temperature, first_column, 0
        )
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, saved_T3)
        ctx.set_materialize_grads(False)
        ctx.shard = (temperature, first_column, width)
        ctx.group = group
        ctx.chunks = (chunk_bytes, num_real)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None) -> Any:
        hidden_TD, weight_VD, targets_T, saved_T3 = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        # The sum over chunks is kept in fp32, or its rounding would grow with their number.
        sums = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sums) if need_weight else None
        for tokens, logits_CV in _logits_chunks(hidden_TD, weight_VD, *ctx.chunks):
            upstream = [None if g is None else g[tokens] for g in (grad_logprobs_T, grad_entropy_T)]
            _ops.vocab_logprob_gradient_(logits_CV, targets_T[tokens], saved_T3[tokens], *upstream, *ctx.shard)
            if grad_hidden_TD is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[tokens])
            if grad_weight_VD is not None:
                grad_weight_VD += logits_CV.t() @ hidden_TD[tokens]
        if grad_hidden_TD is not None and ctx.group is not None:
            dist.all_reduce(grad_hidden_TD, group=ctx.group)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def _logits_chunks(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, chunk_bytes: int, num_real: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the tokens with their logits [C, V], all in one buffer of at most ``chunk_bytes`` (or one token).

    Columns from ``num_real`` on are padding: -inf, so that their probability and gradient are exactly 0.
    """
    num_tokens, width = hidden_TD.shape[0], weight_VD.shape[0]
    chunk = max(1, min(num_tokens, chunk_bytes // max(1, width * hidden_TD.element_size())))
    buffer_CV = hidden_TD.new_empty(chunk, width)
    for start in range(0, num_tokens, chunk):
        tokens = slice(start, min(start + chunk, num_tokens))
        logits_CV = buffer_CV[: tokens.stop - start]
        torch.mm(hidden_TD[tokens], weight_VD.t(), out=logits_CV)
        logits_CV[:, num_real:].fill_(-torch.inf)
        yield tokens, logits_CV
