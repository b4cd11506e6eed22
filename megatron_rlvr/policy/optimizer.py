"""Megatron's optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_rlvr.config.schema import DType, OptimConfig, Schedule
from megatron_rlvr.policy.model import TORCH_DTYPE


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    skipped: bool
    """True when the loss or the gradient was not finite: nothing was updated."""


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up over `warmup_steps`, then constant, or linear or cosine decay to `lr * min_lr_ratio`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule is Schedule.constant:
        return config.lr
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    shape = 1.0 - progress if config.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape)


def build_optimizer(
    chunks: Sequence[torch.nn.Module], config: OptimConfig, *, dtype: DType, distributed: bool
) -> ChainedOptimizer:
    """Adam with fp32 main weights over chunks wrapped in DistributedDataParallel.

    Args:
        distributed: shard the optimizer state over data-parallel ranks.
    """
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.grad_clip,
            bf16=dtype is DType.bf16,
            params_dtype=TORCH_DTYPE[dtype],
            use_distributed_optimizer=distributed,
            log_num_zeros_in_grad=False,
        ),
        list(chunks),
    )


def step_optimizer(optimizer: ChainedOptimizer, lr: float, *, finite: bool = True) -> UpdateResult:
    """Clips and applies the accumulated gradients at learning rate `lr`; one that is not finite is dropped.

    Args:
        finite: whether the loss was, on all ranks; of one that was not, the gradient is dropped too.

    Megatron's own `step` asks for finiteness only under loss scaling, so the parts of it are called one by one.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    found_inf = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if found_inf or not finite or not math.isfinite(norm):
        optimizer.zero_grad()
        return UpdateResult(grad_norm=norm, lr=lr, skipped=True)
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return UpdateResult(grad_norm=norm, lr=lr, skipped=False)


def fused_parts() -> dict[str, str]:
    """Which implementations of optimizer and norms are in use, for the start-up line."""
    from megatron.core.optimizer import Adam

    source = Adam.__module__.split(".")[0]
    engine = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()
    return {
        "optimizer": {"torch": "torch AdamW", "apex": "apex FusedAdam"}.get(source, f"{source} FusedAdam"),
        "layers": "transformer-engine" if engine else "megatron local",
    }
