"""How others compute log-prob and entropy from fp32-cast logits, written anew from their formulas, for comparison.

`eager` is the plain formula. `slime_way` keeps one fp32 softmax for a joint backward; `verl_way` takes the log-prob
from a Megatron-like cross entropy over a clone of the logits and the entropy from a second softmax; `compiled` is
torch.compile over logsumexp formulas. Tensor parallelism is left out: these are the costs on one shard.

Letters: T tokens, V vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LogprobEntropy = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def eager(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 log-softmax, gathered and summed."""
    log_p_TV = logits_TV.float().log_softmax(dim=-1)
    logprobs_T = log_p_TV.gather(-1, targets_T[:, None])[:, 0]
    return logprobs_T, -(log_p_TV.exp() * log_p_TV).sum(dim=-1)


class _JointSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        max_T1 = logits_TV.amax(dim=-1, keepdim=True)
        shifted_TV = logits_TV - max_T1
        target_T1 = shifted_TV.gather(-1, targets_T[:, None])
        softmax_TV = shifted_TV.exp_()
        sum_T1 = softmax_TV.sum(dim=-1, keepdim=True)
        softmax_TV.div_(sum_T1)
        log_sum_T1 = sum_T1.log()
        mean_T1 = (softmax_TV * logits_TV).sum(dim=-1, keepdim=True)
        ctx.save_for_backward(logits_TV, softmax_TV, mean_T1, targets_T)
        return (target_T1 - log_sum_T1)[:, 0], (max_T1 + log_sum_T1 - mean_T1)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_logprobs_T: torch.Tensor, grad_entropy_T: torch.Tensor) -> Any:
        logits_TV, softmax_TV, mean_T1, targets_T = ctx.saved_tensors
        gradient_TV = softmax_TV * -grad_logprobs_T[:, None]
        gradient_TV.scatter_add_(-1, targets_T[:, None], grad_logprobs_T[:, None])
        gradient_TV += (mean_T1 - logits_TV) * softmax_TV * grad_entropy_T[:, None]
        return gradient_TV, None


def slime_way(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One autograd node over an fp32 copy, its softmax saved."""
    return _JointSoftmax.apply(logits_TV.float(), targets_T)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        logits_TV -= logits_TV.amax(dim=-1, keepdim=True)
        target_T = logits_TV.gather(-1, targets_T[:, None])[:, 0].clone()
        softmax_TV = torch.exp(logits_TV, out=logits_TV)
        sum_T = softmax_TV.sum(dim=-1)
        softmax_TV.div_(sum_T[:, None])
        ctx.save_for_backward(softmax_TV, targets_T)
        return sum_T.log() - target_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> Any:
        gradient_TV, targets_T = ctx.saved_tensors
        rows_T = torch.arange(targets_T.shape[0], device=targets_T.device)
        gradient_TV[rows_T, targets_T] -= 1.0
        return gradient_TV.mul_(grad_T[:, None]), None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor) -> torch.Tensor:
        max_T1 = logits_TV.amax(dim=-1, keepdim=True)
        softmax_TV = (logits_TV - max_T1).exp_()
        sum_T1 = softmax_TV.sum(dim=-1, keepdim=True)
        softmax_TV.div_(sum_T1)
        mean_T1 = (softmax_TV * logits_TV).sum(dim=-1, keepdim=True)
        ctx.save_for_backward(logits_TV, softmax_TV, mean_T1)
        return (max_T1 + sum_T1.log() - mean_T1)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> torch.Tensor:
        logits_TV, softmax_TV, mean_T1 = ctx.saved_tensors
        return softmax_TV.mul_((mean_T1 - logits_TV).mul_(grad_T[:, None]))


def verl_way(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and cross entropy as two nodes over fp32 logits and a clone of them."""
    fp32_TV = logits_TV.float()
    entropy_T = _Entropy.apply(fp32_TV.clone())
    return -_CrossEntropy.apply(fp32_TV, targets_T), entropy_T


@torch.compile(dynamic=False)
def compiled(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logsumexp formulas through inductor."""
    fp32_TV = logits_TV.float()
    log_z_T = torch.logsumexp(fp32_TV, dim=-1)
    logprobs_T = fp32_TV.gather(-1, targets_T[:, None])[:, 0] - log_z_T
    p_TV = (fp32_TV - log_z_T[:, None]).exp()
    return logprobs_T, log_z_T - (p_TV * fp32_TV).sum(dim=-1)


PEERS: dict[str, LogprobEntropy] = {
    "eager": eager,
    "slime_way": slime_way,
    "verl_way": verl_way,
    "compiled": compiled,
}
