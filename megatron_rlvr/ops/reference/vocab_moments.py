"""Second moments of the policy by their definitions, in float64."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rlvr.ops.backend import register
from megatron_rlvr.ops.reference.vocab_parallel import vocab_parallel_logprob_entropy


@register("vocab_parallel_moments", backend="reference")
def vocab_parallel_moments(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, group: dist.ProcessGroup | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """See `megatron_rlvr.ops.vocab_parallel_moments`: (log-probs, entropies) and all shards' statistics [R, T, 6]."""
    outputs = vocab_parallel_logprob_entropy(
        logits_TV.detach(), targets_T, temperature=temperature, group=group, inplace_backward=False
    )
    x_TV = logits_TV.detach().double() / temperature
    max_T = x_TV.amax(dim=1) if x_TV.shape[1] else x_TV.new_full((x_TV.shape[0],), -torch.inf)
    d_TV = x_TV - torch.where(max_T == -torch.inf, 0.0, max_T)[:, None]
    e_TV = d_TV.exp()
    d_TV = d_TV.clamp_min(torch.finfo(torch.float64).min)  # 0 * -inf
    sums = [e_TV, d_TV * e_TV, torch.zeros_like(e_TV), e_TV**2, d_TV * e_TV**2]
    packed_T6 = torch.stack([max_T, *(term_TV.sum(dim=1) for term_TV in sums)], dim=1)
    if group is None:
        return outputs, packed_T6[None]
    gathered = [torch.empty_like(packed_T6) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed_T6, group=group)
    return outputs, torch.stack(gathered)
