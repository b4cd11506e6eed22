"""The policy: a Hugging Face model as Megatron chunks, its optimizer, its log-probs and its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlvr.config.schema import ModelConfig, OptimConfig, ParallelConfig
from megatron_rlvr.metrics import Metric, merge
from megatron_rlvr.policy import model, optimizer, platform, weights
from megatron_rlvr.policy.forward import PipelineRunner, TokenLoss
from megatron_rlvr.policy.head import TokenHead
from megatron_rlvr.policy.layers import uses_transformer_engine
from megatron_rlvr.policy.optimizer import UpdateResult
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.types import MicroBatch
from megatron_rlvr.weights.hf_config import ModelShape


@dataclass(kw_only=True, slots=True)
class LogprobPass:
    """Result of a pass without gradient over one rank's micro-batches."""

    logprobs: list[torch.Tensor]
    """float32 [T] nats of every micro-batch; empty off the last pipeline stage."""
    entropy: list[torch.Tensor]
    """float32 [T] nats of every micro-batch; empty off the last pipeline stage."""


class Policy:
    """One rank's part of the model; every method is collective over the trainer's ranks.

    Args:
        path: Hugging Face folder that is loaded.
        trainable: False builds a frozen reference model without gradients and optimizer.

    Example:
        >>> policy = Policy(path, shape, model=config.model, parallel=parallel, optim=config.optim)
        >>> policy.update(micro_batches, loss, lr=1e-6, temperature=1.0)
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        *,
        model_config: ModelConfig,
        parallel: ParallelContext,
        optim: OptimConfig,
        trainable: bool = True,
    ) -> None:
        self.path = Path(path)
        self.shape = shape
        self.device = platform.device()
        self.model_config = model_config
        self.parallel = parallel
        mapping = weights.mapping_for(shape, parallel)
        chunks = model.build_chunks(shape, model_config, parallel.config, padded_vocab_size=mapping.padded_vocab_size)
        self.weights = weights.WeightBridge(shape, chunks, parallel, mapping)
        self.weights.load(path)
        if trainable:
            chunks = list(model.wrap_for_training(chunks, parallel.config))
        else:
            for chunk in chunks:
                chunk.requires_grad_(False)
        self.chunks = chunks
        logits_bytes = None if model_config.logits_mb is None else model_config.logits_mb << 20
        head = TokenHead(parallel, vocab_size=shape.vocab_size, logits_bytes=logits_bytes)
        self.runner = PipelineRunner(chunks, parallel, head=head)
        self.optimizer = None
        if trainable:
            self.reset_optimizer(optim)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the model adds a loss of its own over all tokens, such as one for the balance of its experts."""
        return model.has_auxiliary_loss(self.chunks[0])

    @property
    def attends_packed(self) -> bool:
        """Whether attention is this project's, which lets packed segments continue others (`MicroBatch.prefixes`)."""
        return not uses_transformer_engine()

    def reset_optimizer(self, optim: OptimConfig) -> None:
        """Forgets the optimizer's moments; weights stay."""
        self.optimizer = optimizer.build_optimizer(
            self.chunks,
            optim,
            dtype=self.model_config.dtype,
            distributed=self.parallel.config.distributed_optimizer,
        )

    def logprobs(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> LogprobPass:
        """Log-prob of every target and entropy of every position, without gradient."""
        pairs = self.runner.logprobs(micro_batches, temperature=temperature)
        return LogprobPass(logprobs=[pair[0] for pair in pairs], entropy=[pair[1] for pair in pairs])

    def update(
        self, micro_batches: Sequence[MicroBatch], loss: TokenLoss, *, lr: float, temperature: float
    ) -> tuple[dict[str, Metric], UpdateResult]:
        """One optimizer step on the sum of `loss` over all micro-batches of all data-parallel ranks.

        Returns:
            This rank's metrics (empty off the last pipeline stage) and what the optimizer did.
        """
        assert self.optimizer is not None, "a frozen reference model has no optimizer"
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        bad_losses = torch.zeros((), device=self.device)

        def watched(
            logprobs_T: torch.Tensor, entropy_T: torch.Tensor, micro: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, Metric]]:
            value, metrics = loss(logprobs_T, entropy_T, micro)
            bad_losses.add_(~torch.isfinite(value.detach()))
            return value, metrics

        metrics = self.runner.forward_backward(micro_batches, watched, temperature=temperature)
        finite = not self.parallel.any_rank(self.runner.head.take_broken() or bool(bad_losses))
        return merge(metrics), optimizer.step_optimizer(self.optimizer, lr, finite=finite)

    def save_hf(self, out: str | Path, *, like: str | Path) -> None:
        """Writes the weights as a Hugging Face folder; tokenizer and config files come from `like`. Atomic."""
        self.weights.save(out, like=like)

    def num_parameters(self) -> int:
        """Parameters of the whole model as Hugging Face counts them."""
        return self.weights.num_parameters()


def describe(parallel: ParallelConfig) -> str:
    """The start-up line's words on the layout and on which fused parts are in use."""
    parts = optimizer.fused_parts()
    layout = f"TP{parallel.tp} PP{parallel.pp}" + (f" VPP{parallel.vpp}" if parallel.vpp > 1 else "")
    return f"{layout}{' SP' if parallel.sequence_parallel else ''}; {parts['layers']} layers, {parts['optimizer']}"
