"""The chunked head's oracle: the logits at once, then the plain log-prob and entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.ops.backend import register
from megatron_rlvr.ops.reference.vocab_parallel import vocab_parallel_logprob_entropy


@register("chunked_logprob_entropy", backend="reference")
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
    logits_TV = _SharedInput.apply(hidden_TD, group) @ weight_VD.t()
    padding_V = torch.arange(weight_VD.shape[0], device=weight_VD.device) >= num_real
    logits_TV = logits_TV.masked_fill(padding_V, -torch.inf)
    return vocab_parallel_logprob_entropy(
        logits_TV, targets_T, temperature=temperature, group=group, inplace_backward=False
    )


class _SharedInput(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks that each used the same input."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.group is not None:
            gradient_TD = gradient_TD.clone()
            dist.all_reduce(gradient_TD, group=ctx.group)
        return gradient_TD, None
